"""The manifest: what a bundle is, what it costs, how it is played, and the hash of every file in it.

It holds no clock and no measured time: the same input gives the same bytes. Its last field, `digest`, is the SHA-256 of
the canonical JSON of all other fields (keys sorted, no spaces, everything outside ASCII escaped). That guards against
damage and careless edits; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from qexport.errors import BundleError
from qexport.plan import Plan

FORMAT = "qexport-bundle"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelInfo:
    """The model that a bundle was made of; `image_size` in pixels (square), `source`: where its weights are from."""

    name: str
    family: str
    image_size: int
    num_classes: int
    licence: str
    source: str


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (hexadecimal) and size in bytes of one file."""

    sha256: str
    size: int


def installed_version() -> str:
    """Version of the installed qexport; ``"0"`` where it runs uninstalled."""
    try:
        return version("qexport")
    except PackageNotFoundError:
        return "0"


@dataclass(frozen=True)
class Manifest:
    """Everything `manifest.json` says.

    `graphs` maps a graph name to its .onnx file, `targets` does so for each target that the bundle was lowered to;
    `checkpoints` maps a role to the SHA-256 of the checkpoint file. `layers` has a row for each layer (at least `name`,
    `graph`, `shape`, `format`, `granularity`, `algorithm`, `bits_stored`, `bits_information`, `size_bytes`, `sqnr_db`;
    a row with `activation_format` has quantised activations), `totals` the sums (`bits_per_weight`, `size_bytes` …).
    `training` says how the codes of one graph were trained (at least `method`, `loss`, `start_from`: the algorithms
    whose codes were trained on, `graph`, `data`, `settings`; where parameters of that graph were trained in floating
    point `floats`, a row for each: `name`, `sqnr_db`), None where none were. `notes` are what quantisation came
    upon (`qexport.remarks.summary`): `kind`, `text`, `places`. `calibration` names the images that were calibrated on
    (`samples`, `seed`, `schedule`, `images`, `images_sha256`), None for the model's own samples. `files` is filled in
    by `BundleWriter`.
    """

    model: ModelInfo
    scheme: str
    recipe: str
    dtype: str
    checkpoints: Mapping[str, str]
    plan: Plan
    graphs: Mapping[str, str]
    layers: Sequence[Mapping[str, Any]] = ()
    totals: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    notes: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] | None = None
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    qexport_version: str = field(default_factory=installed_version)
    format_version: int = FORMAT_VERSION

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) over every other field; two bundles with the same digest hold the same bytes."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the digest.

        Raises:
            ValueError: a number is not finite, which JSON cannot hold.
        """
        data: dict[str, Any] = {"format": FORMAT}
        for item in fields(self):
            value = getattr(self, item.name)
            data[item.name] = value.to_json() if isinstance(value, Plan) else value
        if self.training is None:
            del data["training"]  # so that bundles without keep the digest that they had before there was any training
        if not self.notes:
            del data["notes"]  # likewise
        if self.calibration is None:
            del data["calibration"]  # likewise
        data["model"] = asdict(self.model)
        data["files"] = {path: asdict(entry) for path, entry in self.files.items()}
        return json.loads(canonical(data))

    def dumps(self) -> bytes:
        """The bytes of `manifest.json`."""
        data = self.to_json()
        return (json.dumps({**data, "digest": digest_of(data)}, indent=1) + "\n").encode()

    @classmethod
    def loads(cls, text: bytes) -> Manifest:
        """Read what `dumps` wrote, after checking format, version and digest, in this order.

        Raises:
            BundleError: one line that says what is wrong.
        """
        data = _parse(text)
        if data.get("format") != FORMAT:
            raise BundleError("not the manifest of a qexport bundle")
        if data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version")
            raise BundleError(f"format version {found!r}, this qexport reads {FORMAT_VERSION}; quantise again")
        stated = data.pop("digest", None)
        if stated != _digest_or_none(data):
            raise BundleError("was edited or damaged (its digest does not fit); copy the bundle or quantise again")
        try:
            del data["format"]
            _check_kinds(data)
            data["model"] = ModelInfo(**data["model"])
            data["plan"] = Plan.from_json(data["plan"])
            data["files"] = {path: FileEntry(**entry) for path, entry in data["files"].items()}
            return cls(**data)
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"is malformed ({error}); quantise again") from error


def canonical(data: Any) -> bytes:
    """Canonical JSON: keys sorted, separators ``,`` and ``:``, ASCII only; NumPy numbers become plain ones."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=_plain
    ).encode()


def digest_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `data`, in hexadecimal."""
    return hashlib.sha256(canonical(data)).hexdigest()


def _digest_or_none(data: Mapping[str, Any]) -> str | None:
    try:
        return digest_of(data)
    except (ValueError, RecursionError):  # a number such as 1e999, which reads as infinity
        return None


def _check_kinds(data: Mapping[str, Any]) -> None:
    """Raise `TypeError` where a value is not of the kind that the rest of the code relies on."""
    texts = (data["scheme"], data["recipe"], data["dtype"], data["qexport_version"])
    mappings = (data["graphs"], data["checkpoints"], *data["targets"].values())
    texts += tuple(text for mapping in mappings for text in mapping.values())
    texts += tuple(entry["sha256"] for entry in data["files"].values())
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name or a hash is not text")
    if not all(type(entry["size"]) is int for entry in data["files"].values()):
        raise TypeError("a size is not a whole number")
    if not all(isinstance(row, dict) for row in data["layers"]) or not isinstance(data["totals"], dict):
        raise TypeError("layers or totals are of the wrong kind")
    training = data.get("training")
    if training is not None and not (isinstance(training, dict) and isinstance(training.get("graph"), str)):
        raise TypeError("training is of the wrong kind")
    for row in (training or {}).get("floats", ()):
        if not (isinstance(row["name"], str) and isinstance(row["sqnr_db"], int | float)):
            raise TypeError("a trained parameter is of the wrong kind")
    if not all(isinstance(note["text"], str) for note in data.get("notes", ())):
        raise TypeError("a note is not text")
    if not isinstance(data.get("calibration", {}), dict):
        raise TypeError("calibration is of the wrong kind")


def _parse(text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"is not valid JSON ({error}); copy the bundle or quantise again") from error
    if not isinstance(data, dict):
        raise BundleError("not the manifest of a qexport bundle")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key occurs twice")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _plain(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a manifest cannot hold {type(value).__name__} {value!r}")
