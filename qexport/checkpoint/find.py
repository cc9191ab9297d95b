"""From the path that a user gives to the file that holds the weights: a file, an index of shards, or a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexport.checkpoint.unwrap import Role
from qexport.errors import CheckpointError

INDEX_SUFFIX = ".index.json"
MAX_JSON_BYTES = 64 << 20
"""Of an index or a config; the index of a model with ten thousand tensors takes one MB."""

_COMPONENTS: Mapping[Role, tuple[str, ...]] = {"model": ("transformer",), "vae": ("vae", "vqvae")}
"""Folders of a diffusers pipeline."""

_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
_KINDS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def find_weights(path: str | Path, role: Role = "model") -> Path:
    """The weight file or index that `path` means; `role` chooses the component of a diffusers folder.

    Raises:
        CheckpointError: nothing is there, or the folder holds no weights of that role, or several.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: does not exist")
    for name in _COMPONENTS[role]:
        if (path / name).is_dir():
            return _in_folder(path / name)
    if (path / "model_index.json").is_file():
        found = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir())) or "nothing"
        wanted = " or ".join(f"{name}/" for name in _COMPONENTS[role])
        raise CheckpointError(f"{path}: this diffusers pipeline has no {wanted} (it has {found})")
    return _in_folder(path)


def has_component(path: str | Path, role: Role) -> bool:
    """Whether `path` is a diffusers folder with weights of that role in a folder of their own."""
    return any((Path(path) / name).is_dir() for name in _COMPONENTS[role])


def shards(index: Path) -> dict[str, Path]:
    """Which file holds each tensor, as an index of shards says.

    Raises:
        CheckpointError: it is no such index, or a file that it names is not beside it.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: is not an index of shards; it has no weight_map")
    for name in sorted(set(weight_map.values())):
        # A name with a folder in it could point anywhere on the machine.
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index}: names the shard {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names the shard {name}, which is not beside it; fetch it too")
    return {str(key): index.parent / name for key, name in weight_map.items()}


def config_beside(path: Path) -> Mapping[str, Any]:
    """The ``config.json`` beside a weight file, as diffusers writes it; empty where there is none."""
    config = path.parent / "config.json"
    return read_json(config) if config.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is not one.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: is too large for an index or a config")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return data


def _in_folder(folder: Path) -> Path:
    for name in _NAMES:
        for kind in _KINDS:
            if (folder / f"{name}{kind}").is_file():
                return folder / f"{name}{kind}"
    files = sorted(p for p in folder.iterdir() if p.is_file())
    found = [p for p in files if p.name.endswith(INDEX_SUFFIX)] or [p for p in files if p.suffix in _SUFFIXES]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder}: holds {', '.join(p.name for p in found[:4])}; name the file that you mean")
    raise CheckpointError(f"{folder}: holds no weights; expected {_NAMES[0]}{_KINDS[0]} or an index of shards")
