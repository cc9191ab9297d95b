"""ONNX models of the benchmark: the same computation in stock fp16 operators and in the fp8 operators.

Shapes: x_BTD activations, w_NK weights as the operators store them, w_KN as MatMul takes them. A model made with
`probe=True` also outputs every operator's input and result in fp16, under the names `Probe` lists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "qexport.research"
E4M3_MAX = 448.0
EPSILON = 1e-6  # of DiT's LayerNorm
Act = Literal["none", "gelu_tanh"]


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer: `weight` fp16 [N, K], `bias` fp16 [N] or None, its activation scales and what follows it.

    Compared by identity, so that `quantise_weight` can remember what it made of it.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray | None
    x_scale: float
    y_scale: float = 1.0
    act: Act = "none"


@dataclass(frozen=True)
class Probe:
    """An operator to check: names of its fp16 input and fp16 result among the outputs of a probing model."""

    layer: Linear | None  # None for the modulated norm
    source: str
    result: str
    in_fp8: bool
    out_fp8: bool
    y_scale: float
    per_channel: bool
    modulation: tuple[str, str] = ("", "")  # names of (scale, shift) for the norm


@functools.cache
def quantise_weight(layer: Linear, per_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (E4M3 [N, K], fp32 scale [N] or [1]): absmax over the channel or tensor divided by 448, half to even."""
    w = layer.weight.astype(np.float32)
    absmax = np.abs(w).max(axis=1) if per_channel else np.abs(w).max(keepdims=True).reshape(1)
    scale = (absmax / np.float32(E4M3_MAX)).astype(np.float32)
    rows = scale[:, None] if per_channel else scale
    return np.clip(w / rows, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn), scale


@dataclass
class Builder:
    """Collects nodes, initialisers and probes; `probe` says whether probes become outputs."""

    probe: bool
    per_channel: bool = False
    fast_accum: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initialisers: list[onnx.TensorProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    def node(self, op: str, inputs: list[str], out: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        self.nodes.append(helper.make_node(op, inputs, [out], name=out, domain=domain, **attributes))
        return out

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initialiser (numpy dtype kept, E4M3 from ml_dtypes included) and return its name."""
        if value.dtype == ml_dtypes.float8_e4m3fn:
            raw = np.ascontiguousarray(value).tobytes()
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT8E4M3FN, dims=value.shape, raw_data=raw)
        else:
            tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.initialisers.append(tensor)
        return name

    def fp16_view(self, name: str, is_fp8: bool, features: int) -> str:
        """Expose a value as an fp16 output, through Cast (exact) when it is E4M3; return the output's name."""
        out = f"probe_{name}"
        if all(value.name != out for value in self.outputs):
            self.node("Cast", [name], out, to=TensorProto.FLOAT16) if is_fp8 else self.node("Identity", [name], out)
            self.outputs.append(activation(out, features))
        return out

    def stock(self, layer: Linear, x: str) -> str:
        """MatMul, Add and FastGelu (which takes the bias itself)."""
        y = self.node("MatMul", [x, self.constant(f"{layer.name}.w", layer.weight.T)], f"{layer.name}.mm")
        bias = [] if layer.bias is None else [self.constant(f"{layer.name}.b", layer.bias)]
        if layer.act == "gelu_tanh":
            return self.node("FastGelu", [y, *bias], f"{layer.name}.y", domain="com.microsoft")
        return self.node("Add", [y, *bias], f"{layer.name}.y") if bias else y

    def fp8(self, layer: Linear, x: str, in_fp8: bool = False, out_fp8: bool = False) -> str:
        """One Fp8Linear* operator."""
        weight, scale = quantise_weight(layer, self.per_channel)
        inputs = [x, self.constant(f"{layer.name}.w", weight), self.constant(f"{layer.name}.s", scale)]
        if layer.bias is not None:
            inputs.append(self.constant(f"{layer.name}.b", layer.bias))
        attributes: dict[str, Any] = {"x_scale": layer.x_scale, "act": layer.act, "fast_accum": int(self.fast_accum)}
        if out_fp8:
            attributes["y_scale"] = layer.y_scale
        op = "Fp8Linear" + ("FromFp8" if in_fp8 else "") + ("ToFp8" if out_fp8 else "")
        y = self.node(op, inputs, f"{layer.name}.y", domain=DOMAIN, **attributes)
        if self.probe:
            N, K = layer.weight.shape
            source = self.fp16_view(x, in_fp8, K)
            result = self.fp16_view(y, out_fp8, N)
            self.probes.append(Probe(layer, source, result, in_fp8, out_fp8, layer.y_scale, self.per_channel))
        return y

    def stock_norm(self, x: str, name: str, width: int, scale_plus_1: str, shift: str) -> str:
        """LayerNormalization, Mul, Add; `scale_plus_1` arrives with the 1 already in it."""
        ones = self.constant(f"{name}.one", np.ones(width, np.float16))
        normal = self.node("LayerNormalization", [x, ones], f"{name}.ln", axis=-1, epsilon=EPSILON)
        return self.node("Add", [self.node("Mul", [normal, scale_plus_1], f"{name}.mul"), shift], f"{name}.y")

    def fp8_norm(self, x: str, name: str, width: int, scale: str, shift: str, y_scale: float) -> str:
        """One ModulatedNormFp8 operator."""
        y = self.node(
            "ModulatedNormFp8", [x, scale, shift], f"{name}.y", domain=DOMAIN, y_scale=y_scale, epsilon=EPSILON
        )
        if self.probe:
            source, result = self.fp16_view(x, False, width), self.fp16_view(y, True, width)
            self.probes.append(Probe(None, source, result, False, True, y_scale, False, (scale, shift)))
        return y

    def model(self, inputs: list[onnx.ValueInfoProto]) -> bytes:
        """Check the model and return it serialised."""
        graph = helper.make_graph(self.nodes, "fp8", inputs, self.outputs, self.initialisers)
        versions = [
            helper.make_opsetid("", 23),
            helper.make_opsetid("com.microsoft", 1),
            helper.make_opsetid(DOMAIN, 1),
        ]
        model = helper.make_model(graph, opset_imports=versions, ir_version=11)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def activation(name: str, features: int, tokens: str | int = "T") -> onnx.ValueInfoProto:
    """An fp16 value [B, tokens, features]."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", tokens, features])


@dataclass(frozen=True)
class Form:
    """How a model is expressed: `kind` stock | linear (fp8 GEMMs on fp16 values) | fused (fp8 between operators)."""

    name: str
    kind: Literal["stock", "linear", "fused"]
    per_channel: bool = False
    fast_accum: bool = False

    def builder(self, probe: bool) -> Builder:
        """Return an empty builder of this form."""
        return Builder(probe, self.per_channel, self.fast_accum)


def chain(layers: list[Linear], form: Form, probe: bool = False) -> tuple[bytes, list[Probe]]:
    """Chained linear layers x [B, T, K0] -> [B, T, N_last]; fused: every activation between them is E4M3."""
    build, value, last = form.builder(probe), "x", len(layers) - 1
    for i, layer in enumerate(layers):
        if form.kind == "stock":
            value = build.stock(layer, value)
        elif form.kind == "linear":
            value = build.fp8(layer, value)
        else:
            value = build.fp8(layer, value, in_fp8=i > 0, out_fp8=i < last)
    build.outputs.append(activation(value, layers[-1].weight.shape[0]))
    return build.model([activation("x", layers[0].weight.shape[1])]), build.probes


def block(
    layers: dict[str, Linear], norm_scales: tuple[float, float], form: Form, probe: bool = False
) -> tuple[bytes, list[Probe]]:
    """A DiT block without the attention itself: `a` stands for what attention returns.

    qkv = L_qkv(norm(x)); x1 = x + gate1 * L_proj(a); y = x1 + gate2 * L_fc2(gelu(L_fc1(norm(x1)))).
    Stock models take `scale1`, `scale2` with 1 added (a converter folds it into the bias that made them).
    """
    build = form.builder(probe)
    width = layers["proj"].weight.shape[0]
    fused = form.kind == "fused"

    def linear(name: str, x: str, in_fp8: bool = False, out_fp8: bool = False) -> str:
        if form.kind == "stock":
            return build.stock(layers[name], x)
        return build.fp8(layers[name], x, in_fp8, out_fp8)

    def norm(i: int, x: str) -> str:
        if fused:
            return build.fp8_norm(x, f"norm{i}", width, f"scale{i}", f"shift{i}", norm_scales[i - 1])
        return build.stock_norm(x, f"norm{i}", width, f"scale{i}", f"shift{i}")

    qkv = linear("qkv", norm(1, "x"), in_fp8=fused)
    x1 = build.node("Add", ["x", build.node("Mul", ["gate1", linear("proj", "a")], "gated1")], "x1")
    hidden = linear("fc1", norm(2, x1), in_fp8=fused, out_fp8=fused)
    y = build.node("Add", [x1, build.node("Mul", ["gate2", linear("fc2", hidden, in_fp8=fused)], "gated2")], "y")
    build.outputs += [activation(qkv, 3 * width), activation(y, width)]
    inputs = [activation("x", width), activation("a", width)]
    inputs += [activation(f"{name}{i}", width, 1) for i in (1, 2) for name in ("scale", "shift", "gate")]
    return build.model(inputs), build.probes
