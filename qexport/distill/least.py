"""The least memory that a run will take, from shapes alone: asked before calibration, which may take hours.

`qexport.distill.memory` measures once there is a student; what it comes to, with the student itself, is never less than
this, so that nothing is refused here which would have been trained. Counted are

- the student's copy of the weights, and the teacher's where that is moved to a GPU;
- what training keeps of the matrices of the recipe, once that is known (not of what is trained beside them, which only
  the student tells);
- for each sample the outputs, and what enters each repeated block after the first, which even blocks that are computed
  again keep; two bytes a number in bfloat16, of which a part may stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from qexport.distill.memory import OUTPUTS, state_bytes
from qexport.distill.settings import DistillSettings
from qexport.distill.student import trained_graph
from qexport.family import Generator
from qexport.family.graphs import Port
from qexport.reference.device import device_of

_FLOAT, _BFLOAT = 4, 2


def least_bytes(
    generator: Generator, settings: DistillSettings, processes: int = 1, trained: int = 0, device: str = "cpu"
) -> int:
    """Bytes that training will at least take in each process, beyond what is held already.

    `trained` is how many numbers the trained matrices have, 0 if nobody knows yet.
    """
    weights = {id(value): value for graph in generator.graphs for value in graph.parameters().values()}
    copies = 1 if device_of(generator).type == device else 2
    held = copies * sum(value.numel() * value.element_size() for value in weights.values())
    if settings.sharded:
        held -= trained * _FLOAT - trained * _FLOAT // processes
    share = settings.batch // processes
    number = _BFLOAT if settings.bf16 else _FLOAT
    sample = OUTPUTS * _output_numbers(generator) + _block_numbers(generator)
    return held + state_bytes(trained, settings, processes) + share * number * sample


def _output_numbers(generator: Generator) -> int:
    """Numbers of the output for one sample: logits of all its tokens, or a denoiser's output; 0 if no port tells."""
    spec = generator.graph(trained_graph(generator))
    if generator.denoise is not None:
        return _numbers(spec.outputs, generator.denoise.output, generator)
    assert generator.draw is not None
    return _numbers(spec.outputs, generator.draw.logits, generator)


def _block_numbers(generator: Generator) -> int:
    """Numbers that enter the repeated blocks after the first, for one sample."""
    found = 0
    for part in generator.graph(trained_graph(generator)).all_parts:
        handed_on = {port.name for port in part.outputs}
        carried = [port.name for port in part.inputs if port.name in handed_on and "{i}" not in port.name]
        found += (len(part.modules) - 1) * sum(_numbers(part.inputs, name, generator) for name in carried)
    return found


def _numbers(ports: Iterable[Port], name: str, generator: Generator) -> int:
    """Numbers of a port for one sample, all its tokens where their count is left open; 0 if there is no such port."""
    port = next((port for port in ports if port.name == name), None)
    if port is None:
        return 0
    inner = port.shape[1:]
    tokens = sum(generator.quality.scale_lengths) if generator.quality is not None else 1
    return math.prod(dim for dim in inner if isinstance(dim, int)) * (
        1 if all(isinstance(dim, int) for dim in inner) else tokens
    )
