"""A generator as the analysis sees it: the graph that is called again and again, what it predicts, what it leads to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qexport.errors import UnsupportedError
from qexport.family import Generator
from qexport.recipe import recipe_for
from qexport.reference import torch_player
from qexport.reference.twin import quantised_twin
from qexport.runtime import Player
from qexport.scheme import preset
from qexport.solution import Solution


@dataclass(frozen=True)
class Subject:
    """`graph` predicts `output` (guided logits, or noise), `state` is what the decoder is given in the end."""

    generator: Generator
    graph: str
    output: str
    state: str

    @property
    def player(self) -> Player[Tensor]:
        """Plays the torch modules."""
        return torch_player(self.generator)


def subject_of(generator: Generator) -> Subject:
    """Where to look in a model.

    Raises:
        UnsupportedError: it neither draws tokens nor denoises, or its decoder reads more than one state.
    """
    if generator.draw is not None:
        graph, output = generator.draw.graph, generator.draw.logits
    elif generator.denoise is not None:
        graph, output = generator.denoise.graph, generator.denoise.output
    else:
        raise UnsupportedError(f"{generator.entry.name} neither draws tokens nor denoises: nothing to analyse")
    calls = generator.plan.calls
    read = [source.partition(".")[2] for source in calls[-1].inputs.values() if source.startswith("state.")]
    main = next(call for call in calls if call.graph == graph)
    ports = [port for port, state in main.outputs.items() if state in read]
    if len(ports) != 1:
        raise UnsupportedError(
            f"{generator.entry.name}: its decoder reads {len(ports)} states of {graph!r}; one is needed"
        )
    return Subject(generator, graph, output, ports[0])


def rounded(generator: Generator, bits: int) -> Generator:
    """A copy whose default layers are rounded to nearest at so many bits, in groups of 32."""
    scheme = preset(bits)
    recipe = recipe_for(scheme, generator.default_layers, scheme.name)
    return quantised_twin(generator, recipe, Solution()).quantised
