"""NVIDIA Model-Optimizer's ONNX int4, round to nearest, blocks of 32: modelopt_int4.py IN.onnx OUT.onnx"""

from __future__ import annotations

import json
import resource
import sys
import time

import modelopt  # type: ignore[import-not-found]
import onnx
from modelopt.onnx.quantization.int4 import quantize  # type: ignore[import-not-found]

source, out = sys.argv[1:]
start = time.perf_counter()
# No calibration: `awq_lite`, its default, runs the model; `rtn_dq` is what is comparable. The reader is never asked.
model = quantize(source, calibration_method="rtn_dq", calibration_data_reader=iter(()), block_size=32)  # type: ignore[arg-type]
onnx.save(model, out, save_as_external_data=True, location="modelopt.data")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
versions = {"nvidia-modelopt": modelopt.__version__, "onnx": onnx.__version__}
print(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak, "versions": versions}))
