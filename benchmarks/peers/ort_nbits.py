"""onnxruntime's MatMulNBitsQuantizer, 4 bits, symmetric, blocks of 32: ort_nbits.py IN.onnx OUT.onnx"""

from __future__ import annotations

import json
import resource
import sys
import time

import onnx
import onnxruntime
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

source, out = sys.argv[1:]
start = time.perf_counter()
quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True)
quantizer.process()
quantizer.model.save_model_to_file(out, use_external_data_format=True)  # type: ignore[union-attr]
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
print(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak, "versions": versions}))
