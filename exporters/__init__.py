"""Checkpoint → ONNX: loaders, export, graph-surgery passes, lint."""
