"""What a model family hands to the toolchain.

The toolchain knows no family by name. A family is one `Family` object behind an entry point of the group
``qexport.models``; it lists the models it can build and builds one as a `Generator`: torch modules without state and
without randomness, the sampling plan that plays them, and the names of the weights that may be quantised.
"""

from qexport.family.entry import NON_COMMERCIAL, UNPUBLISHED, Effort, ModelEntry
from qexport.family.freedom import Absorber, Fold, StepSpec
from qexport.family.generator import Generator
from qexport.family.graphs import GraphSpec, Part, Port
from qexport.family.judged import INCEPTION, DenoiserModel, DenoiseSpec, DrawSpec, FeatureExtractor, LogitModel
from qexport.family.registry import (
    ENTRY_POINT_GROUP,
    RANDOM_SUFFIX,
    Describe,
    Family,
    Recognise,
    families,
    find_model,
    load_random,
    random_entry,
    random_seed,
    recognise,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "INCEPTION",
    "NON_COMMERCIAL",
    "RANDOM_SUFFIX",
    "UNPUBLISHED",
    "Absorber",
    "DenoiseSpec",
    "DenoiserModel",
    "Describe",
    "DrawSpec",
    "Effort",
    "Family",
    "FeatureExtractor",
    "Fold",
    "Generator",
    "GraphSpec",
    "LogitModel",
    "ModelEntry",
    "Part",
    "Port",
    "Recognise",
    "StepSpec",
    "families",
    "find_model",
    "load_random",
    "random_entry",
    "random_seed",
    "recognise",
]
