"""Plain PyTorch: the payload is the exported program itself. The backend to copy."""
