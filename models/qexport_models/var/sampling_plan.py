"""The ports of VAR's graphs, and the plan that plays them scale by scale."""

from __future__ import annotations

import numpy as np

from qexport.family import GraphSpec, Part, Port
from qexport.plan import Call, Input, Noise, Plan, State, Table
from qexport_models.var.config import VARConfig, VQVAEConfig
from qexport_models.var.graphs import Decode, Step
from qexport_models.var.resize import area_down_1d, bicubic_up_1d, plane

# FID settings of the published models (VAR, README "sampling").
DEFAULT_CFG = 1.5
DEFAULT_TOP_K = 900
DEFAULT_TOP_P = 0.96

CACHE_KINDS = ("key", "value")


def tables(config: VARConfig) -> dict[str, np.ndarray]:
    """Positions and resize matrices of every scale: ``positions.i`` (L,), ``up.i`` (X, L), ``down.i`` (N, X)."""
    full, out = config.scales[-1], {}
    for i, side in enumerate(config.scales):
        # After the last scale there is no next map; one row keeps the port's type and costs nothing.
        following = config.scales[i + 1] if i + 1 < len(config.scales) else 1
        out[f"positions.{i}"] = np.arange(config.first_token[i], config.first_token[i] + side * side)
        out[f"up.{i}"] = plane(bicubic_up_1d(side, full))
        out[f"down.{i}"] = plane(area_down_1d(full, following))
    return out


def graphs(config: VARConfig, step: Step, decode: Decode) -> tuple[GraphSpec, GraphSpec]:
    """`step` and `decode` with their ports."""
    z, area = config.z_channels, config.scales[-1] ** 2
    cache_shape = ("2*batch", config.heads, "past", config.width // config.heads)
    grown_shape = ("2*batch", config.heads, "total", config.width // config.heads)
    names = _cache_names(config)
    f_hat = ("batch", z, area)
    ports = {
        port.name: port
        for port in (
            Port("label", "int64", ("batch",)),
            Port("map", "float32", ("batch", "tokens", z)),
            Port("f_hat", "float32", f_hat),
            Port("uniform", "float32", ("batch", "tokens")),
            Port("cfg", "float32", ()),
            Port("top_k", "int64", ()),
            Port("top_p", "float32", ()),
            Port("temperature", "float32", ()),
            Port("scale", "int64", ()),
            Port("phi", "int64", ()),
            Port("positions", "int64", ("tokens",)),
            Port("up", "float32", (area, "tokens")),
            Port("down", "float32", ("next_tokens", area)),
        )
    }
    drawn = (
        Port("tokens", "int64", ("batch", "tokens")),
        Port("logits", "float32", ("batch", "tokens", config.vocab_size)),
        Port("next_f_hat", "float32", f_hat),
        Port("next_map", "float32", ("batch", "next_tokens", z)),
    )
    x = Port("x", "float32", ("2*batch", "tokens", config.width))
    classes = Port("class", "float32", ("2*batch", config.width))
    modulation = Port("modulation", "float32", ("2*batch", 1, 6, config.width) if config.shared_aln else classes.shape)
    parts = (
        Part(
            modules=(step.embed,),
            inputs=tuple(ports[name] for name in ("label", "map", "scale", "positions")),
            outputs=(x, classes, modulation),
        ),
        Part(
            modules=tuple(step.blocks),
            inputs=(x, modulation, *(Port(f"past_{kind}.{{i}}", "float32", cache_shape) for kind in CACHE_KINDS)),
            outputs=(x, *(Port(f"{kind}.{{i}}", "float32", grown_shape) for kind in CACHE_KINDS)),
            prefix="blocks.{i}.",
        ),
        Part(
            modules=(step.draw,),
            inputs=(x, classes, *(port for name, port in ports.items() if name not in ("label", "map", "positions"))),
            outputs=drawn,
        ),
    )
    step_spec = GraphSpec(
        name="step",
        module=step,
        inputs=(*ports.values(), *(Port(f"past_{name}", "float32", cache_shape) for name in names)),
        outputs=(*drawn, *(Port(name, "float32", grown_shape) for name in names)),
        example_dims={"batch": 3, "tokens": 9, "past": 5, "next_tokens": 16, "total": 14},
        parts=parts,
    )
    pixels = decode.side * 2 ** (len(decode.decoder.up) - 1)
    decode_spec = GraphSpec(
        name="decode",
        module=decode,
        inputs=(Port("f_hat", "float32", f_hat),),
        outputs=(Port("image", "float32", ("batch", 3, pixels, pixels)),),
        example_dims={"batch": 3},
    )
    return step_spec, decode_spec


def plan(config: VARConfig, vae: VQVAEConfig) -> Plan:
    """One `step` per scale, then `decode`. The tables get their offsets when they are written."""
    z, area = config.z_channels, config.scales[-1] ** 2
    names = _cache_names(config)
    cache_shape = ("2*batch", config.heads, "past", config.width // config.heads)
    side = config.scales[-1] * vae.downsample
    each = tuple(
        {
            "scale": i,
            "phi": vae.phi_index[i],
            "tokens": count,
            "positions": f"table:positions.{i}",
            "up": f"table:up.{i}",
            "down": f"table:down.{i}",
        }
        for i, count in enumerate(config.tokens_per_scale)
    )
    scalars = ("cfg", "top_k", "top_p", "temperature")
    step = Call(
        graph="step",
        inputs={
            "label": "input.label",
            "map": "state.map",
            "f_hat": "state.f_hat",
            "uniform": "noise.uniform",
            **{name: f"input.{name}" for name in scalars},
            **{name: f"const.{name}" for name in ("scale", "phi", "positions", "up", "down")},
            **{f"past_{name}": f"state.{name}" for name in names},
        },
        outputs={"next_f_hat": "f_hat", "next_map": "map", **{name: name for name in names}},
        each=each,
    )
    return Plan(
        inputs=(
            Input("label", "int64", ("batch",), minimum=0, maximum=config.num_classes - 1, doc="class of each image"),
            Input("cfg", "float32", default=DEFAULT_CFG, minimum=0, maximum=100, doc="guidance; 0 is none"),
            Input("top_k", "int64", default=DEFAULT_TOP_K, minimum=0, doc="draw from the k best tokens; 0 is all"),
            Input("top_p", "float32", default=DEFAULT_TOP_P, minimum=0, maximum=1, doc="nucleus; 0 is all"),
            Input("temperature", "float32", default=1.0, minimum=1e-4, maximum=100, doc="divides the logits"),
        ),
        state=(
            State("map", "float32", ("batch", "first_tokens", z)),
            State("f_hat", "float32", ("batch", z, area)),
            *(State(name, "float32", cache_shape) for name in names),
            State("image", "float32", ("batch", 3, side, side)),
        ),
        noise=(Noise("uniform", "uniform", ("batch", "tokens")),),
        calls=(step, Call("decode", {"f_hat": "state.f_hat"}, {"image": "image"})),
        output="image",
        dims={"past": 0, "first_tokens": config.tokens_per_scale[0]},
        tables={name: Table(t.dtype.name, t.shape, 0, t.nbytes) for name, t in tables(config).items()},
    )


def _cache_names(config: VARConfig) -> list[str]:
    return [f"{kind}.{i}" for i in range(config.depth) for kind in CACHE_KINDS]
