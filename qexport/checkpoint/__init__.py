"""Checkpoint files: found, opened without running anything in them, unwrapped to one flat state dict.

A file is judged by its content, never by its suffix. Torch files are opened with ``weights_only=True``, memory-mapped
where their format allows it (not the one before torch 1.6); safetensors always are. So the tensors of a state dict are
views of the file, and opening a file of 8 GB costs neither time nor memory until a weight is used.

Nested dicts are descended, averaged weights (EMA) first, and the way is kept in `Checkpoint.trail` and logged. A
checkpoint of a trainer may hold generator and decoder; the role says which is wanted.
"""

from qexport.checkpoint.find import find_weights
from qexport.checkpoint.read import Checkpoint, Shape, companion, open_checkpoint, sha256
from qexport.checkpoint.unwrap import Role

__all__ = ["Checkpoint", "Role", "Shape", "companion", "find_weights", "open_checkpoint", "sha256"]
