"""The teacher's outputs kept on disk: asked once for each sample, read ever after.

``teacher.f32`` holds float32 (N, …), one row for each sample to train on, and ``teacher.done`` one byte for each: 1
once its row is there. Both are memory-mapped and sparse, so that memory holds what is in use and a run that was killed
goes on with what is there. A row is what the model gave when its sample was first met, bit for bit; asked live, another
batch around a sample may change the last bits, where a matrix product's order of additions depends on the row's place
(it does not on the processors that the tests ran on).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qexport.distill.tasks import Batch
from qexport.errors import InputError

OUTPUTS, DONE = "teacher.f32", "teacher.done"

_SPARE = 1.05
"""Of the disk's free space: checkpoints come to it."""


class CachedTeacher:
    """A teacher's prediction of samples by their number."""

    def __init__(self, predict: Callable[..., Tensor], folder: Path, samples: int) -> None:
        """Take the live teacher, a folder of this run alone, and how many samples there are."""
        self._predict, self._folder, self._samples = predict, folder, samples
        self._rows: np.memmap | None = None
        self._done: np.memmap | None = None

    def __call__(self, index_B: Tensor, batch: Batch) -> Tensor:
        """The outputs (B, …) float32, on the CPU, of the samples with these numbers, whose tensors `batch` holds.

        Raises:
            InputError: the disk has no room for all samples.
        """
        index = index_B.numpy()
        if self._rows is None or self._done is None:
            live = self._predict(*batch).float().cpu()
            self._open(tuple(live.shape[1:]))
            assert self._done is not None
            missing = np.flatnonzero(self._done[index] == 0)
            self._keep(index[missing], live.numpy()[missing])
        elif not self._done[index].all():  # the whole batch is asked, as a live teacher would be: the same bits
            missing = np.flatnonzero(self._done[index] == 0)
            self._keep(index[missing], self._predict(*batch).float().cpu().numpy()[missing])
        assert self._rows is not None
        return torch.from_numpy(self._rows[index])

    def _keep(self, index: np.ndarray, rows: np.ndarray) -> None:
        assert self._rows is not None
        assert self._done is not None
        self._rows[index] = rows
        self._done[index] = 1  # after its row, so that what is marked is there

    def _open(self, shape: tuple[int, ...]) -> None:
        path, marks = self._folder / OUTPUTS, self._folder / DONE
        needed = self._samples * math.prod(shape) * np.dtype(np.float32).itemsize
        if not marks.exists():
            free = shutil.disk_usage(self._folder).free
            if needed * _SPARE > free:
                raise InputError(
                    f"{path}: the teacher's outputs take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take "
                    "fewer samples, or do not cache"
                )
        for file, size in ((path, needed), (marks, self._samples)):
            with file.open("ab") as handle:  # of several processes the first makes it; the length is the same for all
                handle.truncate(size)
        self._rows = np.memmap(path, np.float32, "r+", shape=(self._samples, *shape))
        self._done = np.memmap(marks, np.uint8, "r+", shape=(self._samples,))
