"""Session options for ONNX Runtime's CPU provider. Measured with 1.31.1 on AVX2 without VNNI.

- Weight-only layers fuse to MatMulNBits. At accuracy level 4 (the default) it also quantises the activations to int8:
  20 times faster at one row (1024→4096: 0.25 ms against 5.2 ms at level 0), a tenth faster at 1024 rows, and 0.5 % off
  (1 % on channels with outliers). Level 0 keeps float32.
- int8 weights with int8 activations of a known scale (static, or of the step) fuse to MatMulIntegerToFloat. Its kernel
  for CPUs without VNNI saturates in 16 bits: 1.1 % error against exact integers. `session.x64quantprecision=1` brings
  it to 3e-7 and costs a tenth there (81 ms instead of 74). That error is a defect of a kernel and not a choice of the
  recipe, so both sets avoid it. With VNNI sums are exact without the option, which makes products half as fast and
  less (`benchmarks/int8_products.py`): it is set only where the processor is not known to have VNNI. It turns int8
  weights into uint8 ones with a scalar zero point, which a layer with a scale per channel that was not fused then
  refuses at run time, unless it has zero points of its own: the exporter gives them to layers with integer activations.
  Where other int8 weights are in the same graph, Q/DQ is not fused beside the option.
- Per token, activations go through Q/DQ and the weight is fused as if it were weight-only. Level 4 would quantise them
  a second time (0.6 % error), so it is not used there. int4 weights with static activations are not fused.
- 2-bit weights behind int8 inputs of a known scale are fused to a MatMulIntegerToFloat that has no 2-bit kernel: the
  session cannot be made. With `session.disable_quant_qdq=1` they are dequantised once, at load, instead.
- Convolutions are fused to QLinearConv only in front of a QuantizeLinear that alone reads them; `lower` writes that
  operator (`qexport.lower.passes.integer_convolution`). With `session.disable_quant_qdq=1` the weights of all others
  are dequantised once, at load, and take the usual blocked kernel.
- QLinearConv multiplies uint8 by int8, so the same holds for it: the option makes it two to three times as slow
  (`benchmarks/convolutions.py`).
- Sessions with fp8 Q/DQ fail to load unless `session.disable_quant_qdq=1`, which also stops MatMulNBits fusion.
- The kernels for one row and for several differ by 1e-4 at level 4: images then depend a little on the batch.
- Idle threads of a session spin for tens of milliseconds. With `session.intra_op.allow_spinning=0`, which changes no
  number, an image of var-c10-d4 on two threads takes 59 ms of processor time instead of 146, and no longer by the clock
  (`benchmarks/waiting_threads.py`).
- Initialisers outside of the arena (`session.use_device_allocator_for_initializers=1`) change nothing, to a megabyte.
  Without the arena a batch of 8 leaves 30 MB instead of 173, once the C library has given back what it kept, and takes
  9 to 15 % more processor time (batch 1: the same). So the arena stays. `benchmarks/session_memory.py` shows the parts.
"""

from __future__ import annotations

from qexport.targets.config import OptionSet, QuantTraits, SessionConfig
from qexport.targets.fusion import PRODUCTS, Fusion, WeightUse, not_fused, weight_only
from qexport.targets.processor import sums_exactly


def session_config(options: OptionSet, traits: QuantTraits) -> SessionConfig:
    """Options for one of the two sets; see the module for what they change."""
    level = "0" if options == "exact" or traits.per_token else "4"
    entries = {"session.qdq_matmulnbits_accuracy_level": level, "session.intra_op.allow_spinning": "0"}
    unsigned = not sums_exactly()
    refused = unsigned and traits.integer and traits.other_int8
    if traits.any_fp8 or traits.convolution or traits.two_bit or refused:
        entries["session.disable_quant_qdq"] = "1"
    fused = traits.integer and "session.disable_quant_qdq" not in entries
    if unsigned and (fused or traits.integer_convolution):
        entries["session.x64quantprecision"] = "1"
    return SessionConfig(provider="CPUExecutionProvider", device="cpu", entries=entries)


def fused_form(use: WeightUse) -> Fusion:
    """What the CPU provider is expected to make of a weight.

    int8 with int8 activations of a known scale becomes MatMulIntegerToFloat. With a scale per token the weight is fused
    as if it were weight-only, behind Q/DQ that are not; 8-bit floating point turns all fusion off.
    """
    if use.activation_format is None:
        return weight_only(use)
    if use.operator in PRODUCTS and use.per_token and not use.activation_format.startswith("fp8"):
        return weight_only(use)
    if use.operator in PRODUCTS and not use.per_token and use.format == use.activation_format == "int8":
        return Fusion("MatMulIntegerToFloat")
    return not_fused("cpu", use)
