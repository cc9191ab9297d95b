"""Open checkpoint files: nothing in them is executed, and tensors stay views of the file until they are used."""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qexport.checkpoint.content import Content, content_of
from qexport.checkpoint.find import INDEX_SUFFIX, config_beside, find_weights, has_component, shards
from qexport.checkpoint.unwrap import Role, holds_decoder, tensors_in, unwrap
from qexport.errors import CheckpointError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]

REASON_LENGTH = 160
"""A reader's own words are cut to this, so that the message stays a line."""

_CHUNK_BYTES = 1 << 22
_BLOCKED_GLOBAL = re.compile(r"GLOBAL (?:`|')?([\w.]+)")

_PLAIN_DATA: list[Any] = [argparse.Namespace]
"""Training scripts save their options beside the weights; a namespace is filled from a dict and runs nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `path` is the weight file or the index of shards, `files` what the tensors lie in. `state` is flat; `trail` are the
    keys of the nested dicts that led to it. `config` is the ``config.json`` beside it, if any.
    """

    path: Path
    files: tuple[Path, ...]
    state: Mapping[str, Tensor]
    trail: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor; reads nothing."""
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def __str__(self) -> str:
        way = f", {' → '.join(self.trail)}" if self.trail else ""
        parts = f" in {len(self.files)} shards" if len(self.files) > 1 else ""
        return f"{self.path}{way}: {len(self.state)} tensors{parts}"


def open_checkpoint(path: str | Path, role: Role = "model") -> Checkpoint:
    """Open a file (.pth, .pt, .bin, .safetensors), an index of shards, or a diffusers folder.

    Raises:
        CheckpointError: there is no such file, it is unsafe, damaged, or holds no state dict of that role.
    """
    file = find_weights(path, role)
    if file.name.endswith(INDEX_SUFFIX):
        where = shards(file)
        files = tuple(sorted(set(where.values())))
        raw: object = _gathered(file, where)
    else:
        files, raw = (file,), _raw(file)
    try:
        state, trail = unwrap(raw, role)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    opened = Checkpoint(file, files, state, trail, config_beside(file))
    log.info("read %s", opened)
    return opened


def companion(checkpoint: str | Path | None) -> str | None:
    """`checkpoint` again if the decoder lies in it too (a diffusers folder, the checkpoint of a trainer), else None."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if path.is_dir():
        return str(path) if has_component(path, "vae") else None
    if not path.is_file() or path.name.endswith(INDEX_SUFFIX):
        return None
    return str(path) if holds_decoder(_raw(path)) else None


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; of an index, that of the lines ``<SHA-256>  <name>`` of its shards in order.

    The latter is what ``sha256sum *.safetensors | sha256sum`` prints in their folder.
    """
    if path.name.endswith(INDEX_SUFFIX):
        lines = "".join(f"{sha256(shard)}  {shard.name}\n" for shard in sorted(set(shards(path).values())))
        return hashlib.sha256(lines.encode()).hexdigest()
    stat = path.stat()
    return _file_sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Size and time tell a file that was replaced; reading 8 GB twice is worth avoiding."""
    del size, mtime_ns
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _gathered(index: Path, where: Mapping[str, Path]) -> dict[str, Tensor]:
    """The tensors that an index names, from their shards."""
    opened: dict[Path, dict[str, Tensor]] = {}
    for shard in sorted(set(where.values())):
        try:
            opened[shard] = unwrap(_raw(shard))[0]
        except CheckpointError as error:
            text = str(error)
            raise CheckpointError(text if text.startswith(str(shard)) else f"{shard}: {text}") from error
    lacking = next((key for key, shard in where.items() if key not in opened[shard]), None)
    if lacking is not None:
        raise CheckpointError(f"{index}: says that {where[lacking].name} holds {lacking}, which it does not")
    return {key: opened[shard][key] for key, shard in where.items()}


def _raw(path: Path) -> object:
    """What a file holds, not unwrapped."""
    content = content_of(path)
    if content is Content.SAFETENSORS:
        return _safetensors(path)
    return _torch(path, content)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dict
    except Exception as error:  # safetensors checks lengths and offsets; torch may lack a dtype
        reason = _reason(error)
        damaged = "Incomplete" in reason or "InvalidOffset" in reason
        said = "is truncated or damaged; copy or download it again" if damaged else "cannot be read as safetensors"
        raise CheckpointError(f"{path}: {said} ({reason})") from error


def _torch(path: Path, content: Content) -> object:
    try:
        with torch.serialization.safe_globals(_PLAIN_DATA), path.open("rb") as file:
            # Mapping needs a path, but torch takes any path that ends so for safetensors, whatever it holds.
            mapped = content is Content.TORCH and path.suffix != ".safetensors"
            raw = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile pickle may provoke anything; all of it means "not a checkpoint"
        if blocked := _BLOCKED_GLOBAL.search(str(error)):
            raise CheckpointError(
                f"{path}: its pickle wants to call {blocked[1]}, which is not data; nothing was run. "
                "Save the state dict by itself: torch.save(model.state_dict(), FILE)"
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read as a torch file, it is truncated, damaged or unsafe ({_reason(error)})"
        ) from error
    size, held = path.stat().st_size, _held_bytes(raw)
    if held > size:
        raise CheckpointError(f"{path}: declares tensors of {held:,} bytes in a file of {size:,}; not used")
    return raw


def _held_bytes(raw: object) -> int:
    """Bytes of all storages in `raw`, each counted once."""
    storages: dict[int, int] = {}
    for tensor in tensors_in(raw):
        if tensor.layout == torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _reason(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:REASON_LENGTH]
