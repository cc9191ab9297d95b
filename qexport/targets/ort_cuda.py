"""Session options for ONNX Runtime's CUDA provider. Measured with 1.31.1 on one H100.

- float32 matmuls and convolutions round their inputs to TF32 (10 bits) by default; `use_tf32=0` keeps float32.
- Weight-only int4/int8 fuses to MatMulNBits. `ep.cuda.fpa_intb_gemm=1` is twice as fast at 16 rows (183 against 390 µs
  for eight matmuls) and twice as slow at 4096 (2847 against 1516 µs); generators run both, so it stays off.
- A static int8 or fp8 QDQ matmul fuses to nothing and dequantises its weight at every run (631 µs at 2 rows). With
  `session.disable_quant_qdq=1` the weights are folded once (224 µs) and activations are still quantised. It would also
  stop MatMulNBits, so it is set only if no layer is weight-only.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace

from qexport.targets.config import OptionSet, QuantTraits, SessionConfig
from qexport.targets.fusion import Fusion, WeightUse, not_fused, weight_only


def session_config(options: OptionSet, traits: QuantTraits) -> SessionConfig:
    """Options for one of the two sets; see the module for what they change."""
    entries = {"session.disable_quant_qdq": "1"} if traits.with_activations and not traits.weight_only else {}
    return SessionConfig(
        provider="CUDAExecutionProvider",
        device="cuda",
        entries=entries,
        provider_options={"use_tf32": "0"} if options == "exact" else {},
    )


def captured(config: SessionConfig) -> SessionConfig:
    """The same with CUDA graphs on: for `qexport.runtime.static_backend`, which gives every shape an id of its own.

    All nodes must be on CUDA and all addresses fixed; ONNX Runtime refuses the session where they are not.
    """
    return replace(config, provider_options={**config.provider_options, "enable_cuda_graph": "1"})


def fused_form(use: WeightUse) -> Fusion:
    """What the CUDA provider is expected to make of a weight: no kernel takes quantised activations."""
    return weight_only(use) if use.activation_format is None else not_fused("cuda", use)


def device_count() -> int:
    """How many GPUs the CUDA driver shows; 0 without a driver.

    The GPU builds of ONNX Runtime list their CUDA provider on every machine, so only the driver can tell.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def used_bytes() -> int | None:
    """Memory of the first GPU that is taken, by anyone, in bytes; None without a driver or a device.

    The driver tells it to holders of a context; the device's primary one is shared with ONNX Runtime.
    """
    if not device_count():
        return None
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    context = ctypes.c_void_p()
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) != 0 or driver.cuCtxPushCurrent_v2(context) != 0:
        return None
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    status = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    return total.value - free.value if status == 0 else None
