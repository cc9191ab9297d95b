"""What a bundle or an .onnx file holds: layers, formats, bits, operators. Reading only; nothing is run.

A bundle is read from its manifest, without torch and without onnx; where onnx is installed, its graphs are read too.
"""

from qexport.inspect.bundle import BundleReport, GraphRow, inspect_bundle
from qexport.inspect.layers import LayerRow
from qexport.targets import Fusion, WeightUse, fused_forms

__all__ = ["BundleReport", "Fusion", "GraphRow", "LayerRow", "WeightUse", "fused_forms", "inspect_bundle"]
