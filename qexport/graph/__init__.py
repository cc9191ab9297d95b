"""Graphs: capture from torch, passes over onnx_ir, invariants. Capture is floating point; quantisation is inserted."""
