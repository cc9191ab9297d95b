"""The runtime: plays a bundle with NumPy and ONNX Runtime, without torch and without onnx.

images = qexport.runtime.load("qexport-out/var-c10-d4-w4a16").generate([1, 8], seed=3)
"""

from qexport.runtime.player import Backend, CallRecord, Player
from qexport.runtime.runtime import Runtime, load

__all__ = ["Backend", "CallRecord", "Player", "Runtime", "load"]
