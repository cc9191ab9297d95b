"""Session options for ONNX Runtime's CPU provider. Measured with 1.31.1 on AVX2 without VNNI.

- Weight-only layers fuse to MatMulNBits. At accuracy level 4 (the default) it also quantises the activations to int8:
  20 times faster at one row (1024→4096: 0.25 ms against 5.2 ms at level 0), a tenth faster at 1024 rows, and 0.5 % off
  (1 % on channels with outliers). Level 0 keeps float32.
- Static int8 fuses to MatMulIntegerToFloat, whose kernel for CPUs without VNNI saturates in 16 bits: 1.1 % error
  against exact integers. `session.x64quantprecision=1` brings it to 3e-7 and costs a tenth (81 ms instead of 74). That
  error is a defect of a kernel and not a choice of the recipe, so both sets avoid it. The option turns int8 weights
  into uint8 ones with a scalar zero point, which a weight-only layer with a scale per channel then refuses at run time
  (1.31.1), so it is set only where activations are quantised.
- Sessions with fp8 Q/DQ fail to load unless `session.disable_quant_qdq=1`, which also stops MatMulNBits fusion.
- The kernels for one row and for several differ by 1e-4 at level 4: images then depend a little on the batch.
"""

from __future__ import annotations

from qexport.targets.config import OptionSet, QuantTraits, SessionConfig


def session_config(options: OptionSet, traits: QuantTraits) -> SessionConfig:
    """Options for one of the two sets; see the module for what they change."""
    entries = {"session.qdq_matmulnbits_accuracy_level": "0" if options == "exact" else "4"}
    if traits.with_activations:
        entries["session.x64quantprecision"] = "1"
    if traits.any_fp8:
        entries["session.disable_quant_qdq"] = "1"
    return SessionConfig(provider="CPUExecutionProvider", device="cpu", entries=entries)
