"""The ports of DiT's graphs, the schedules a bundle carries, and the plan that plays them."""

from __future__ import annotations

import numpy as np

from qexport.family import GraphSpec, Part, Port
from qexport.plan import Call, Input, Noise, Plan, State, Table
from qexport_models.autoencoder_kl.decode import Decode
from qexport_models.dit.config import DiTConfig
from qexport_models.dit.denoise import DenoiseStep
from qexport_models.dit.schedule import ROW_COLUMNS, ddim_rows, ddpm_rows, make_schedule

DEFAULT_CFG = 1.5
"""Of the published FIDs (arXiv:2212.09748, table 2); 4.0 gives the showcase pictures: less variety, more polish."""

SCHEDULE_STEPS = (10, 20, 25, 50, 100, 250)
"""Lengths of both samplers in every bundle: 36 KB. Each divides 1000, as the whole strides of DDIM need."""

PUBLISHED_SCHEDULE = "ddpm-250"
"""The published evaluation."""

C10_SCHEDULE = "ddpm-50"
"""What the reference models were evaluated with."""

NOISE_PORT, STATE_PORT, OUTPUT_PORT = "noise", "next_x", "output"


def schedule_table(name: str) -> str:
    """The table of a schedule."""
    return f"schedule.{name}"


def tables() -> dict[str, np.ndarray]:
    """Rows of every schedule, each (steps, len(ROW_COLUMNS)) float32: ``schedule.ddpm-50``, ``schedule.ddim-25`` …"""
    ddpm = {f"ddpm-{steps}": ddpm_rows(make_schedule(steps)) for steps in SCHEDULE_STEPS}
    ddim = {f"ddim-{steps}": ddim_rows(make_schedule(f"ddim{steps}")) for steps in SCHEDULE_STEPS}
    return {schedule_table(name): rows for name, rows in (ddpm | ddim).items()}


def graphs(config: DiTConfig, step: DenoiseStep, decode: Decode) -> tuple[GraphSpec, GraphSpec]:
    """`denoise` and `decode` with their ports."""
    latent = _latent_shape(config)
    x = Port("x", "float32", latent)
    label, row = Port("label", "int64", ("batch",)), Port("row", "float32", (len(ROW_COLUMNS),))
    rest = (Port(NOISE_PORT, "float32", latent), row, Port("cfg", "float32", ()), Port("eta", "float32", ()))
    outputs = (
        Port(STATE_PORT, "float32", latent),
        Port(OUTPUT_PORT, "float32", _latent_shape(config, config.out_channels)),
    )
    tokens = Port("tokens", "float32", ("2*batch", config.num_tokens, config.hidden_size))
    condition = Port("condition", "float32", ("2*batch", config.hidden_size))
    denoise = GraphSpec(
        name="denoise",
        module=step,
        inputs=(label, x, *rest),
        outputs=outputs,
        example_dims={"batch": 3},
        parts=(
            Part((step.embed,), inputs=(label, x, row), outputs=(tokens, condition)),
            Part(tuple(step.blocks), inputs=(tokens, condition), outputs=(tokens,), prefix="blocks.{i}."),
            Part((step.update,), inputs=(tokens, condition, x, *rest), outputs=outputs),
        ),
    )
    pixels = config.input_size * decode.downsampling
    decoder = GraphSpec(
        name="decode",
        module=decode,
        inputs=(x,),
        outputs=(Port("image", "float32", ("batch", 3, pixels, pixels)),),
        example_dims={"batch": 3},
    )
    return denoise, decoder


def plan(config: DiTConfig, image_size: int, schedule: str) -> Plan:
    """`denoise` once per row of the default `schedule`, then `decode`. Tables get their offsets when written."""
    latent = _latent_shape(config)
    rows = tables()
    denoise = Call(
        graph="denoise",
        inputs={
            "label": "input.label",
            "x": "state.x",
            NOISE_PORT: "noise.normal",
            "row": f"row.{schedule_table(schedule)}",
            "cfg": "input.cfg",
            "eta": "input.eta",
        },
        outputs={STATE_PORT: "x"},
        repeat=len(rows[schedule_table(schedule)]),
    )
    return Plan(
        inputs=(
            Input("label", "int64", ("batch",), minimum=0, maximum=config.num_classes - 1, doc="class of each image"),
            Input("cfg", "float32", default=DEFAULT_CFG, minimum=0, maximum=100, doc="guidance; 1 is none"),
            Input("eta", "float32", default=0.0, minimum=0, maximum=1, doc="noise of DDIM; DDPM ignores it"),
        ),
        state=(
            State("x", "float32", latent, "noise.normal"),
            State("image", "float32", ("batch", 3, image_size, image_size)),
        ),
        noise=(Noise("normal", "normal", latent),),
        calls=(denoise, Call("decode", {"x": "state.x"}, {"image": "image"})),
        output="image",
        tables={name: Table(t.dtype.name, t.shape, 0, t.nbytes) for name, t in rows.items()},
        schedules={name.removeprefix(schedule_table("")): name for name in rows},
        schedule=schedule,
    )


def _latent_shape(config: DiTConfig, channels: int | None = None) -> tuple[str, int, int, int]:
    return ("batch", channels or config.in_channels, config.input_size, config.input_size)
