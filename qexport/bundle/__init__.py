"""A bundle: one folder that holds everything needed to generate images without PyTorch.

``manifest.json`` lists and hashes every file outside ``reports/``; `docs/bundle.md` describes the format in prose.
"""

from qexport.bundle.manifest import FORMAT_VERSION, Manifest, ModelInfo
from qexport.bundle.reader import Bundle
from qexport.bundle.weights import WeightFileWriter, WeightRef
from qexport.bundle.writer import BundleWriter

__all__ = ["FORMAT_VERSION", "Bundle", "BundleWriter", "Manifest", "ModelInfo", "WeightFileWriter", "WeightRef"]
