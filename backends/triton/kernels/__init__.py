"""The kernels. Importing one needs triton; ``launch.py`` does it when a CUDA tensor arrives."""
