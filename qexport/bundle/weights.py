"""The weight file: tensors one after another, written as they are made.

Offsets are multiples of 64 bytes (a cache line, and the widest vector register), or of 4096 bytes (a memory page) for
tensors of 64 KiB and more: ONNX asks for page alignment where a runtime may map external data into memory instead of
copying it. Small tensors (scales, biases) are not worth a page each. Gaps are zero bytes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from qexport.plan import DTYPES, Table

SMALL_ALIGNMENT_BYTES = 64
LARGE_ALIGNMENT_BYTES = 4096
LARGE_TENSOR_BYTES = 64 * 1024

BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "int4": 4, "int2": 2,
    "uint64": 64, "uint32": 32, "uint16": 16, "uint8": 8, "uint4": 4, "uint2": 2, "bool": 8,
    "float8e4m3fn": 8, "float8e5m2": 8, "float8e8m0": 8, "float4e2m1": 4,
}  # fmt: skip
"""Bits per element of each dtype, spelt as ONNX does; narrow ones are packed low bits first, as ONNX packs them."""


@dataclass(frozen=True)
class WeightRef:
    """Where a tensor lies in the weight file: C order, little endian, `nbytes` bytes from `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def table(self) -> Table:
        """The same place as a table of the sampling plan.

        Raises:
            ValueError: the dtype is not one that a plan may name.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name}: a plan table cannot be {self.dtype}; one of {', '.join(DTYPES)}")
        return Table(dtype=self.dtype, shape=self.shape, offset=self.offset, nbytes=self.nbytes)


class WeightFileWriter:
    """Appends tensors to one file and hashes them on the way. Only names are kept, so it may be larger than memory.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, path: Path) -> None:
        """Create (or empty) the file at `path`."""
        self.path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._end = 0
        self._refs: dict[str, WeightRef] = {}

    @property
    def refs(self) -> dict[str, WeightRef]:
        """Every tensor written so far, by name, in the order of writing."""
        return dict(self._refs)

    @property
    def sha256(self) -> str:
        """Of everything written so far, in hexadecimal."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes | np.ndarray, dtype: str, shape: tuple[int, ...]) -> WeightRef:
        """Append one tensor.

        Args:
            name: unique in this file.
            data: the elements in C order; an array is written little endian, bytes (or uint8) as they are.
            dtype: element type as ONNX spells it, one of `BITS`.
            shape: logical shape; a packed type takes fewer bytes than elements.

        Raises:
            ValueError: the name was written before, the dtype is unknown or not that of the array, or the bytes are
                not as many as the shape needs.
        """
        if name in self._refs:
            raise ValueError(f"tensor {name!r} is already in {self.path.name}; each weight is stored once")
        if dtype not in BITS:
            raise ValueError(f"tensor {name!r} has unknown dtype {dtype!r}; one of {', '.join(BITS)}")
        view = _flat_bytes(name, data, dtype) if isinstance(data, np.ndarray) else data
        nbytes = -(-math.prod(shape) * BITS[dtype] // 8)
        if len(view) != nbytes:
            raise ValueError(f"tensor {name!r}: {dtype} {tuple(shape)} needs {nbytes} bytes, got {len(view)}")
        alignment = LARGE_ALIGNMENT_BYTES if nbytes >= LARGE_TENSOR_BYTES else SMALL_ALIGNMENT_BYTES
        padding = -self._end % alignment
        for piece in (bytes(padding), view):
            self._file.write(piece)  # a buffered file hands large writes straight through: no second copy
            self._digest.update(piece)
        ref = WeightRef(name, dtype, tuple(shape), self._end + padding, nbytes)
        self._end = ref.offset + nbytes
        self._refs[name] = ref
        return ref

    def close(self) -> None:
        """Flush and close; may be called again."""
        self._file.close()

    def __enter__(self) -> WeightFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _flat_bytes(name: str, array: np.ndarray, dtype: str) -> memoryview:
    given = array.dtype.name.replace("_", "")  # ml_dtypes spells float8_e4m3fn
    if given not in (dtype, "uint8"):
        raise ValueError(f"tensor {name!r}: the array is {given}, not {dtype}")
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8).data
