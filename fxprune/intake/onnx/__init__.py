"""An ONNX file becomes a module: read and checked, op by op, proven equal to what onnxruntime makes of the file."""
