"""ONNX for ONNX Runtime and whatever else reads it: ``legalize.py`` prepares the graph, ``backend.py`` writes it."""
