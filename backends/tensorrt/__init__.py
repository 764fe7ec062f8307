"""TensorRT engines: checked for coverage, built, run against the program; or everything up to there without a GPU."""
