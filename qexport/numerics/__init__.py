"""Arithmetic on plain NumPy arrays: affine quantisation, packing, metrics. Nothing here needs torch or onnx."""
