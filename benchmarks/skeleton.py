"""Bundles without their numbers: enough to time them on another machine, small enough to carry there.

    python benchmarks/skeleton.py pack BUNDLE... --out FILE.tar.xz
    python benchmarks/skeleton.py unpack FILE.tar.xz --out FOLDER       one bundle below FOLDER for each that was packed

Kept exactly: what the player and the graphs that were lowered to the target need to be themselves (manifest, plan and
its tables, the .onnx files, every integer table, every tensor below `EXACT_BYTES`). Larger weights become a place and
a type, and are random again after unpacking: weights normal with a deviation of 0.02, codes bell-shaped around zero,
scales positive, so that activations stay finite in float16. Portable graphs and other targets are left out, and the
bytes that only they read are holes in the files.

How fast a graph runs does not depend on the values of its weights: no kernel branches on them, and nothing is sparse.
Images from a skeleton are noise. `Bundle.open` takes it with ``check="size"``; a full check refuses it, since the
hashes are those of the bundle.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from qexport.bundle import Bundle
from qexport.bundle.files import MANIFEST, REPORTS, WEIGHTS

TARGET = "ort-cuda"
HEADER = "skeleton.json"
KEPT = "kept.bin"
FACTS = f"{REPORTS}/{HEADER}"
"""Where an unpacked bundle says what the packed one was: `size_bytes`, `added_bytes`."""

EXACT_BYTES = 64 * 1024
"""Smaller tensors keep their values: biases, norms, scales per channel."""

BLOCK_BYTES = 16 * 1024 * 1024
"""Random numbers are drawn once for each kind of tensor, and repeated."""

WEIGHT_DEVIATION = 0.02
SCALE_DEVIATION, LEAST_SCALE = 0.01, 1e-3
BYTE_DEVIATION, NIBBLE_DEVIATION = 32, 2  # of codes, so that times their scales they are as wide as plain weights
LARGEST_FP8 = {"FLOAT8E4M3FN": 0x6F, "FLOAT8E5M2": 0x3F}  # bit patterns without sign: 120 and 1.75; NaN is far above

Role = Literal["exact", "weight", "scale", "zero_point"]

UNARY = ("Cast", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze")
FILLED = ("FLOAT", "FLOAT16", "INT8", "UINT8", "INT4", "UINT4", *LARGEST_FP8)


@dataclass(frozen=True)
class Piece:
    """Bytes of a data file: `dtype` as ONNX spells it, `role` says whether they are kept or what fills them."""

    file: str
    offset: int
    length: int
    dtype: str
    role: Role


# Packing ------------------------------------------------------------------------------------------------------------


def pack(bundles: Sequence[Path], out: Path, exact_bytes: int = EXACT_BYTES, target: str = TARGET) -> int:
    """Write the skeletons of bundles that were lowered to `target` into one archive; returns its size in bytes.

    Raises:
        BundleError: a bundle is damaged (sizes only are checked).
        InputError: it was not lowered to the target.
        ValueError: a tensor lies in a data file without saying how long it is.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with tarfile.open(partial, "w:xz", preset=9) as archive:
        for path in bundles:
            for name, data in _skeleton(Bundle.open(path, "size"), exact_bytes, target):
                entry = tarfile.TarInfo(f"{path.resolve().name}/{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    partial.replace(out)
    return out.stat().st_size


def _skeleton(bundle: Bundle, exact_bytes: int, target: str) -> Iterator[tuple[str, bytes]]:
    """Files of one skeleton, by name."""
    root, manifest = bundle.path, bundle.manifest
    graphs = {name: file.relative_to(root).as_posix() for name, file in bundle.graph_files(target).items()}
    pieces = _pieces(bundle, graphs.values(), exact_bytes)
    wanted = {*graphs.values(), *(piece.file for piece in pieces), *({WEIGHTS} & set(manifest.files))}
    files = {name: entry for name, entry in manifest.files.items() if name in wanted}
    lowered = {name: file for name, file in graphs.items() if name in manifest.targets[target]}
    yield MANIFEST, replace(manifest, graphs=graphs, targets={target: lowered}, files=files).dumps()
    for file in dict.fromkeys(graphs.values()):
        yield file, (root / file).read_bytes()
    prefix = f"targets/{target}/"
    header = {
        "sizes": {name: entry.size for name, entry in files.items() if name not in graphs.values()},
        "pieces": [astuple(piece) for piece in pieces],
        "facts": {
            "size_bytes": bundle.size_bytes,
            "added_bytes": sum(entry.size for name, entry in manifest.files.items() if name.startswith(prefix)),
        },
    }
    yield HEADER, json.dumps(header).encode()
    yield KEPT, b"".join(_read(root, piece) for piece in pieces if piece.role == "exact")


def _pieces(bundle: Bundle, graphs: Iterable[str], exact_bytes: int) -> list[Piece]:
    """Every stretch of a data file that the plan or a graph reads, in order, each once."""
    found = {
        (WEIGHTS, table.offset): Piece(WEIGHTS, table.offset, table.nbytes, table.dtype, "exact")
        for table in bundle.plan.tables.values()
    }
    for file in graphs:
        model = onnx.load(str(bundle.path / file), load_external_data=False)
        roles = _roles(model.graph)
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            if "length" not in place:
                raise ValueError(f"{bundle.path / file}: tensor {tensor.name!r} does not say how long it is")
            offset, length = int(place.get("offset", 0)), int(place["length"])
            dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
            exact = length < exact_bytes or dtype not in FILLED
            role: Role = "exact" if exact else roles.get(tensor.name, "weight")
            key = (place["location"], offset)
            if key not in found or (found[key].role == "weight" and role != "weight"):
                found[key] = Piece(place["location"], offset, length, dtype, role)
    return [found[key] for key in sorted(found)]


def _roles(graph: onnx.GraphProto) -> dict[str, Role]:
    """Values that are scales or zero points, also through operators that only change type or shape."""
    makers = {output: node for node in graph.node for output in node.output}
    found: dict[str, Role] = {}
    for node in graph.node:
        first = {"DequantizeLinear": 1, "QuantizeLinear": 1, "MatMulNBits": 2}.get(node.op_type)
        if first is None:
            continue
        roles: tuple[Role, Role] = ("scale", "zero_point")
        for name, role in zip(node.input[first : first + 2], roles, strict=False):
            source = name
            while source in makers and makers[source].op_type in UNARY:
                source = makers[source].input[0]
            found[source] = role
    return found


def _read(root: Path, piece: Piece) -> bytes:
    with (root / piece.file).open("rb") as file:
        file.seek(piece.offset)
        return file.read(piece.length)


# Unpacking ----------------------------------------------------------------------------------------------------------


def unpack(file: Path, out: Path, seed: int = 0) -> list[Path]:
    """Write the bundles of an archive below `out`, large weights filled at random; returns their folders.

    Raises:
        tarfile.TarError: the archive is damaged, or leads out of `out`.
    """
    texts: dict[str, bytes] = {}
    with tarfile.open(file, "r:xz") as archive:
        for entry in archive:
            name, data = tarfile.data_filter(entry, str(out)).name, archive.extractfile(entry)
            texts[name] = data.read() if data else b""
    found = [out / name.partition("/")[0] for name in texts if name.endswith(f"/{HEADER}")]
    for folder in found:
        own = {name.removeprefix(f"{folder.name}/"): text for name, text in texts.items()
               if name.startswith(f"{folder.name}/")}  # fmt: skip
        header, kept = json.loads(own.pop(HEADER)), own.pop(KEPT)
        own[FACTS] = json.dumps(header["facts"]).encode()
        for name, text in own.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text)
        _write_data(folder, header["sizes"], [Piece(*piece) for piece in header["pieces"]], kept, seed)
    return found


def _write_data(folder: Path, sizes: Mapping[str, int], pieces: Sequence[Piece], kept: bytes, seed: int) -> None:
    """The data files: kept bytes at their places, the rest filled."""
    rest = memoryview(kept)
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(size)
    for name in dict.fromkeys(piece.file for piece in pieces):
        with (folder / name).open("r+b") as file:
            for piece in (piece for piece in pieces if piece.file == name):  # sorted by file, as `kept` is
                file.seek(piece.offset)
                if piece.role == "exact":
                    file.write(rest[: piece.length])
                    rest = rest[piece.length :]
                    continue
                block = filling(piece.dtype, piece.role, seed)
                for start in range(0, piece.length, len(block)):
                    file.write(block[: piece.length - start])


@cache
def filling(dtype: str, role: Role, seed: int = 0) -> memoryview:
    """`BLOCK_BYTES` of random numbers of one kind.

    Args:
        dtype: as ONNX spells it, one of `FILLED`.
        role: ``"weight"``, ``"scale"`` (above 0) or ``"zero_point"`` (all 0).
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    if role == "zero_point":
        return memoryview(bytes(BLOCK_BYTES))
    if dtype in LARGEST_FP8:
        sign = rng.integers(0, 2, BLOCK_BYTES, np.uint8) << 7
        return memoryview((sign | rng.integers(0, LARGEST_FP8[dtype] + 1, BLOCK_BYTES, np.uint8)).tobytes())
    if dtype in ("FLOAT", "FLOAT16"):
        kind = np.dtype("<f4" if dtype == "FLOAT" else "<f2")
        normal = rng.standard_normal(BLOCK_BYTES // kind.itemsize, np.float32)
        values = np.abs(normal) * SCALE_DEVIATION + LEAST_SCALE if role == "scale" else normal * WEIGHT_DEVIATION
        return memoryview(values.astype(kind).tobytes())
    if dtype == "INT8":
        codes = np.rint(rng.standard_normal(BLOCK_BYTES, np.float32) * BYTE_DEVIATION)
        return memoryview(np.clip(codes, -127, 127).astype(np.int8).tobytes())
    nibbles = np.clip(np.rint(rng.standard_normal(2 * BLOCK_BYTES, np.float32) * NIBBLE_DEVIATION), -7, 7)
    middle = 0 if dtype == "INT4" else 8  # of unsigned ones; a byte of two such nibbles is near its own middle, 128
    unsigned = (nibbles.astype(np.int8) + middle).astype(np.uint8) & 0x0F
    return memoryview((unsigned[::2] | unsigned[1::2] << 4).tobytes())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    packing = commands.add_parser("pack")
    packing.add_argument("bundles", type=Path, nargs="+")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--exact-bytes", type=int, default=EXACT_BYTES)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("file", type=Path)
    unpacking.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    answer: Any
    if args.command == "pack":
        answer = {"out": str(args.out), "bytes": pack(args.bundles, args.out, args.exact_bytes)}
    else:
        answer = [str(path) for path in unpack(args.file, args.out)]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
