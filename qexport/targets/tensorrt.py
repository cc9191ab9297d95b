"""Session options for ONNX Runtime's TensorRT provider. Not measured here; names are those of its documentation.

TensorRT builds an engine for the shapes that it sees and reads Q/DQ as precisions: symmetric int8 and fp8 with known
scales, int4 weights in blocks of 64 or 128. `exact` keeps float32 elsewhere; `serve` lets it take float16 kernels.
What a bundle must be for it, `qexport.lower` checks.

The RTX variant is a plug-in package of its own (`onnxruntime-ep-nv-tensorrt-rtx-cu13`) with other option names, and no
target here. Version 0.5.0 registers with onnxruntime-gpu 1.31.1 on an H100 and offers no device there: that has compute
capability 9.0, and the library supports 8.6, 8.9, and 12.0 and above (`research/tensorrt_rtx`).
"""

from __future__ import annotations

from qexport.targets.config import OptionSet, QuantTraits, SessionConfig

INTEGERS = frozenset({"int8", "int6"})


def session_config(options: OptionSet, traits: QuantTraits) -> SessionConfig:
    """Options for one of the two sets; see the module for what they change."""
    chosen = {"trt_cuda_graph_enable": "1" if options == "serve" else "0"}
    if options == "serve":
        chosen["trt_fp16_enable"] = "1"
    if traits.activations & INTEGERS or traits.weight_only & INTEGERS:
        chosen["trt_int8_enable"] = "1"  # without it, int8 Q/DQ is refused where types are not strong
    return SessionConfig(provider="TensorrtExecutionProvider", device="cuda", provider_options=chosen)
