"""qexport: quantise image generators, write ONNX bundles, verify that they compute what the model computed."""
