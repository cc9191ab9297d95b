"""A model ready for quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qexport.family.entry import Effort, ModelEntry
from qexport.family.freedom import Fold, StepSpec
from qexport.family.graphs import GraphSpec
from qexport.family.judged import DenoiseSpec, DrawSpec, FeatureExtractor, LogitModel
from qexport.plan import Plan

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Generator:
    """A model ready for quantisation: graphs, plan, and what may be quantised.

    `layers` maps a layer name (``blocks.3.ffn.fc2``) to (graph, initialiser name) for every matrix (out, in) that a
    recipe may name; `default_layers` are the patterns that the presets quantise. `quality` answers teacher forcing;
    `denoise` does the same for a diffusion model, which draws no tokens.
    `features`, where there are any, measure generated images; `effort` is what `verify` does by default.
    `checkpoint_sha256` maps the role of each checkpoint file to its hash. `licence` is shown where weights are loaded.
    `folds` are where smoothing may hide, `steps` which steps may have activation scales of their own (None: none).
    """

    entry: ModelEntry
    graphs: tuple[GraphSpec, ...]
    plan: Plan
    layers: Mapping[str, tuple[str, str]]
    default_layers: tuple[str, ...]
    draw: DrawSpec | None
    quality: LogitModel | None
    tables: Mapping[str, np.ndarray]
    checkpoint_sha256: Mapping[str, str]
    denoise: DenoiseSpec | None = None
    features: FeatureExtractor | None = None
    effort: Effort = field(default_factory=Effort)
    folds: tuple[Fold, ...] = ()
    steps: StepSpec | None = None

    @property
    def decoder_layers(self) -> dict[str, tuple[str, str]]:
        """Matrices and convolutions of the decoder, the graph that the plan calls last: ``decode/decoder.conv_in``.

        Tables that are looked up (a codebook) are none.

        As `layers`, but a weight may have four dimensions (outputs, inputs, height, width); a recipe sees it as a
        matrix (outputs, inputs · height · width).
        """
        from torch import nn

        graph = self.plan.calls[-1].graph
        spec = self.graph(graph)
        modules = (inner for part in spec.all_parts for module in part.modules for inner in module.modules())
        looked_up = {id(inner.weight) for inner in modules if isinstance(inner, nn.Embedding)}
        return {
            f"{graph}/{name.removesuffix('.weight')}": (graph, name)
            for name, value in spec.parameters().items()
            if name.endswith(".weight")
            and value.ndim in (2, 4)
            and id(value) not in looked_up
            and (graph, name) not in self.layers.values()
        }

    def graph(self, name: str) -> GraphSpec:
        """The graph of that name."""
        return next(g for g in self.graphs if g.name == name)
