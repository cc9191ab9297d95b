"""A bundle as one .onnx: the sampling plan, unrolled.

For servers that run one graph and nothing else. Inputs are those of the plan and one tensor of random numbers for each
noise (batch, numbers an image draws). All must be given: an ONNX file can hold defaults, as initialisers of an input's
name, but servers do not agree on showing such inputs, and ONNX Runtime warns of them. So the plan's defaults stand in
the metadata, under `DEFAULTS_KEY`, a JSON object.

Weights are there once: every call refers to the same initialisers, and what is computed from weights alone
(DequantizeLinear, Cast) is there once as well. ONNX Runtime 1.31 fuses DequantizeLinear and MatMul into MatMulNBits
only where nobody else uses the weight, so that here it dequantises once a run and multiplies in float32. That is what
a bundle computes under the session options named ``exact``: the same bits (`EQUAL_OPTIONS`).

What the caller must know about the noise stands in the metadata under `NOISE_KEY`: a JSON list of draws in order, each
with `name`, `distribution` and `numbers` (an image's). Image n of seed s takes them from
``Generator(Philox(key=[s, n]))``, draw by draw, and each draw is appended to the row of its input. VAR has one noise,
so that its input is ``Generator(Philox(key=[s, n])).random(N, float32)`` for each image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qexport.bundle import Bundle
from qexport.bundle.files import explain_os_error
from qexport.errors import InputError, UnsupportedError
from qexport.plan import Plan
from qexport.runtime.inputs import check_inputs, to_arrays
from qexport.ship.atomic import moved_into

if TYPE_CHECKING:
    import onnxruntime

MAX_CALLS = 64
"""More calls than this are not unrolled: nodes, and the time to load them, grow with each (a call of var-d16 has 3,000
nodes). VAR has 11, DDIM with 50 steps 51; LlamaGen's 256 tokens are for a player."""

MAX_SINGLE_BYTES = 2**31 - 2**26
"""A protobuf message ends at 2 GiB; above this, leaving 64 MiB for nodes, weights go to a second file."""

EQUAL_OPTIONS = "exact"
"""The session options under which a bundle computes what its unrolled file computes."""

NOISE_KEY = "qexport.noise"
DEFAULTS_KEY = "qexport.defaults"
DIGEST_KEY = "qexport.digest"


@dataclass(frozen=True)
class Draw:
    """So many numbers of a noise, of each image."""

    name: str
    distribution: str
    numbers: int


@dataclass(frozen=True)
class Shipped:
    """What was written."""

    files: tuple[Path, ...]
    calls: int
    nodes: int
    draws: tuple[Draw, ...]

    @property
    def noise(self) -> dict[str, int]:
        """How many numbers each noise input takes for an image."""
        totals: dict[str, int] = {}
        for draw in self.draws:
            totals[draw.name] = totals.get(draw.name, 0) + draw.numbers
        return totals


def write_onnx(bundle: Bundle, out: str | Path, schedule: str | None = None, overwrite: bool = False) -> Shipped:
    """Unroll the plan of `bundle` into the file `out`; all or nothing.

    Args:
        bundle: what to unroll.
        out: the file; weights go into it, or from 2 GiB on into ``<out>.data`` beside it.
        schedule: of a diffusion model, in place of the default.
        overwrite: whether `out` may be replaced.

    Raises:
        UnsupportedError: the plan has too many calls, or a graph has subgraphs.
        InputError: no such schedule; `out` exists, or cannot be written.
    """
    import onnx_ir as ir

    from qexport.ship.unroll import unroll

    path = Path(out)
    if path.suffix != ".onnx":
        raise InputError(f"{path}: must end in .onnx")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path}: exists; choose another name, or pass --overwrite")
    plan = bundle.plan if schedule is None else bundle.plan.with_schedule(schedule)
    calls = sum(call.iterations for call in plan.calls)
    if calls > MAX_CALLS:
        instead = "ship it with fewer steps (--schedule)" if plan.schedules else "ship it to triton, or play the bundle"
        raise UnsupportedError(
            f"{bundle.manifest.model.name}: {calls} calls of a graph, and at most {MAX_CALLS} can be unrolled into one "
            f"file; {instead}"
        )
    model, draws = unroll(plan, bundle)
    model.metadata_props[NOISE_KEY] = json.dumps([asdict(draw) for draw in draws])
    defaults = {spec.name: spec.default for spec in plan.inputs if spec.default is not None}
    model.metadata_props[DEFAULTS_KEY] = json.dumps(defaults)
    model.metadata_props[DIGEST_KEY] = bundle.manifest.digest
    weights_bytes = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    large = weights_bytes > MAX_SINGLE_BYTES
    data = f"{path.name}.data" if large else None
    names = [name for name in (path.name, data) if name is not None]
    try:
        with moved_into(path.parent, names) as folder:
            # Without a name for external data, weights stay where they are: in the bundle.
            if not large:
                ir.external_data.load_to_model(model)
            ir.save(model, folder / path.name, external_data=data)
    except OSError as error:
        raise explain_os_error(error, path) or error from error
    return Shipped(tuple(path.with_name(name) for name in names), calls, model.graph.num_nodes(), draws)


def noise_arrays(draws: Sequence[Draw], images: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The noise inputs for images given as (seed, number): float32 of shape (batch, numbers) by name."""
    from qexport.runtime.noise import NoiseStream

    stream = NoiseStream.of_images(images)
    pieces: dict[str, list[np.ndarray]] = {}
    for draw in draws:
        pieces.setdefault(draw.name, []).append(stream.draw(draw.distribution, (draw.numbers,)))
    return {name: np.concatenate(rows, axis=1) for name, rows in pieces.items()}


def play_file(
    session: onnxruntime.InferenceSession, plan: Plan, images: Sequence[tuple[int, int]], **inputs: object
) -> np.ndarray:
    """Images of an unrolled file, as `Runtime.generate` gives them; for checks, and an example of its use."""
    draws = [Draw(**item) for item in json.loads(session.get_modelmeta().custom_metadata_map[NOISE_KEY])]
    given = check_inputs(plan, to_arrays(plan, inputs), {**plan.dims, "batch": len(images)})
    return np.asarray(session.run([plan.output], {**given, **noise_arrays(draws, images)})[0])
