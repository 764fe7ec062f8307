"""What a GPU is asked: correctness, the kernel, whole models, and what compiling costs. One command, resumable."""
