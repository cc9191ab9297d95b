"""`torch.onnx.export(dynamo=True)` of the plain DiT module in float32: torch_export.py MODEL OUT.onnx"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch

from qexport.family import load_random

model, out = sys.argv[1:]
generator = load_random(model, 0)
assert generator.denoise is not None
dit = generator.denoise.model.dit  # type: ignore[attr-defined]
del generator
side, channels = dit.config.input_size, dit.config.in_channels
feeds = (torch.randn(2, channels, side, side), torch.tensor([500, 500]), torch.tensor([1, 2]))
batch = {0: torch.export.Dim.DYNAMIC}
start = time.perf_counter()
with torch.no_grad():
    torch.onnx.export(dit, feeds, out, dynamo=True, external_data=True, dynamic_shapes=(batch, batch, batch))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak, "versions": {"torch": torch.__version__}}))
