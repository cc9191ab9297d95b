"""What is computed: the layers, their calibrated scales, the inputs, and the block in torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from forms import E4M3_MAX, EPSILON, Linear

CHAIN_LAYERS = 8
BLOCK_TOKENS = 256  # of one 256-pixel image in DiT


@dataclass(frozen=True)
class Sizes:
    """Widths of the models: the chain narrow <-> wide, the block's width and its MLP's."""

    narrow: int = 1920
    wide: int = 7680
    width: int = 1152
    mlp: int = 4608


def weight(generator: np.random.Generator, N: int, K: int) -> np.ndarray:
    """Normal weights that keep the variance of what passes through them, fp16 [N, K]."""
    return (generator.standard_normal((N, K), dtype=np.float32) / np.sqrt(K)).astype(np.float16)


def amax_scale(x: torch.Tensor) -> float:
    """Static scale that maps the largest magnitude seen to 448."""
    return float(x.abs().max().float()) / E4M3_MAX


def make_chain(sizes: Sizes, device: str) -> list[Linear]:
    """Eight layers without bias; activation scales calibrated on 256 normal rows in fp32."""
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.standard_normal((256, sizes.narrow), dtype=np.float32)).to(device)
    weights, scales = [], []
    for i in range(CHAIN_LAYERS):
        N, K = (sizes.wide, sizes.narrow) if i % 2 == 0 else (sizes.narrow, sizes.wide)
        weights.append(weight(generator, N, K))
        scales.append(amax_scale(x))
        x = x @ torch.from_numpy(weights[-1]).to(device).float().T
    scales.append(amax_scale(x))
    return [Linear(f"l{i}", w, None, scales[i], scales[i + 1]) for i, w in enumerate(weights)]


def block_inputs(sizes: Sizes, batch: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """fp16 inputs of the block: normal activations, modulation of a few tenths (scale without the 1)."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (batch, tokens, sizes.width), "a": (batch, tokens, sizes.width)}
    shapes |= {f"{n}{i}": (batch, 1, sizes.width) for i in (1, 2) for n in ("scale", "shift", "gate")}
    gain = {name: 1.0 if name in ("x", "a") else 0.3 for name in shapes}
    return {n: (torch.randn(s, generator=generator) * gain[n]).half().to(device) for n, s in shapes.items()}


def plus_one(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs of the models with stock norms: the modulation's 1 is already in the scale."""
    return {n: t + 1 if n.startswith("scale") else t for n, t in inputs.items()}


def torch_block(layers: dict[str, dict[str, torch.Tensor]], v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The block in torch in the precision of its arguments; returns every value by name."""
    functional = torch.nn.functional

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, layers[name]["w"], layers[name]["b"])

    def norm(x: torch.Tensor, i: int) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + v[f"scale{i}"]) + v[f"shift{i}"]

    n1 = norm(v["x"], 1)
    qkv = linear("qkv", n1)
    x1 = v["x"] + v["gate1"] * linear("proj", v["a"])
    n2 = norm(x1, 2)
    hidden = functional.gelu(linear("fc1", n2), approximate="tanh")
    return {"n1": n1, "qkv": qkv, "n2": n2, "hidden": hidden, "y": x1 + v["gate2"] * linear("fc2", hidden)}


def torch_weights(layers: dict[str, Linear], dtype: torch.dtype, device: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return weights `w` [N, K] and biases `b` [N] of layers that have both, as torch_block takes them."""
    return {
        name: {
            "w": torch.from_numpy(layer.weight).to(device, dtype),
            "b": torch.from_numpy(layer.bias).to(device, dtype),
        }
        for name, layer in layers.items()
    }


def make_block(sizes: Sizes, device: str) -> tuple[dict[str, Linear], tuple[float, float]]:
    """The block's four layers with biases, and the scales of its two normalised activations, calibrated in fp32."""
    generator = np.random.default_rng(2)
    d, h = sizes.width, sizes.mlp
    shapes = {"qkv": (3 * d, d), "proj": (d, d), "fc1": (h, d), "fc2": (d, h)}
    weights = {n: weight(generator, *s) for n, s in shapes.items()}
    biases = {n: (0.1 * generator.standard_normal(s[0])).astype(np.float16) for n, s in shapes.items()}
    values = {n: t.float() for n, t in block_inputs(sizes, 4, BLOCK_TOKENS, device).items()}
    raw = {n: Linear(n, weights[n], biases[n], 1.0) for n in shapes}
    seen = torch_block(torch_weights(raw, torch.float32, device), values)
    scale = {"qkv": amax_scale(seen["n1"]), "proj": amax_scale(values["a"]), "fc1": amax_scale(seen["n2"])}
    scale["fc2"] = amax_scale(seen["hidden"])
    layers = {
        n: Linear(n, weights[n], biases[n], scale[n], scale["fc2"], "gelu_tanh" if n == "fc1" else "none")
        for n in shapes
    }
    return layers, (scale["qkv"], scale["fc1"])
