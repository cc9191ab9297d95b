"""Distillation: the full-precision model teaches its quantised self. `docs/topkld.md` tells what that is worth."""

from qexport.distill.data import Samples, drawn_latents, drawn_tokens, image_tokens
from qexport.distill.losses import LOSSES, TOPK_LOSSES, Distillation
from qexport.distill.processes import from_first, is_first, process_group, wait
from qexport.distill.run import Distilled, distill
from qexport.distill.settings import DistillSettings
from qexport.distill.trainer import History

__all__ = [
    "LOSSES",
    "TOPK_LOSSES",
    "DistillSettings",
    "Distillation",
    "Distilled",
    "History",
    "Samples",
    "distill",
    "drawn_latents",
    "drawn_tokens",
    "from_first",
    "image_tokens",
    "is_first",
    "process_group",
    "wait",
]
