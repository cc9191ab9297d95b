"""The exporter's record of which module a node came from: a list of dotted paths, the node's own name last."""

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
