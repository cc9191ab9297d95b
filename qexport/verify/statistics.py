"""Mean and covariance of features: gathered batch by batch, read from and written to the files that evaluations share.

Such a file is an .npz with ``mu`` (D,) and ``sigma`` (D, D), the covariance with n − 1 in the denominator. Published
evaluation batches have both beside sample images, which are then not needed. Files that are written here also say
of how many images they are (``images``) and whose features they hold (``features``, SHA-256 of the weights).

Legend: B images in a batch, D features.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qexport.errors import InputError

SYMMETRY_TOLERANCE = 1e-6
"""Greatest |σ − σᵀ| relative to the greatest |σ|. Sums in float32 (2⁻²⁴ = 6e-8 each) in another order stay below."""


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` (D,) and covariance `cov` (D, D), float64, of `images` images (None: the file does not say)."""

    mu: np.ndarray
    cov: np.ndarray
    images: int | None
    source: str


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    Batches are merged by their own means (Chan, Golub and LeVeque 1979: S = S_a + S_b + δδᵀ·n_a n_b / n), so that
    nothing cancels where the mean is far from zero, as that of features behind a ReLU is. Memory: D² numbers.
    """

    def __init__(self, width: int) -> None:
        """For features (B, `width`)."""
        self.count = 0
        self._mean_D = np.zeros(width)
        self._scatter_DD = np.zeros((width, width))

    def add(self, features_BD: np.ndarray) -> None:
        """Take a batch into account."""
        x_BD = features_BD.astype(np.float64)
        if not len(x_BD):
            return
        mean_D = x_BD.mean(axis=0)
        x_BD -= mean_D
        total = self.count + len(x_BD)
        delta_D = mean_D - self._mean_D
        self._scatter_DD += x_BD.T @ x_BD
        self._scatter_DD += np.outer(delta_D, delta_D * (self.count * len(x_BD) / total))
        self._mean_D += delta_D * (len(x_BD) / total)
        self.count = total

    def result(self, source: str) -> Statistics:
        """The statistics of all batches.

        Raises:
            InputError: fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"{source}: a covariance needs at least 2 images, not {self.count}")
        return Statistics(self._mean_D.copy(), self._scatter_DD / (self.count - 1), self.count, source)


def read_statistics(path: Path, width: int, weights_sha256: str) -> Statistics | None:
    """The statistics in a file; None where it is a folder or an .npz without any.

    Args:
        path: an .npz.
        width: features that there must be.
        weights_sha256: of the weights that the other side's features come from; a file that names others is refused.

    Raises:
        InputError: the file cannot be read, or what it holds are no such statistics.
    """
    if path.is_dir():
        return None
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not {"mu", "sigma"} & set(file.files):
                return None
            found = {name: file[name] for name in ("mu", "sigma", "images", "features") if name in file.files}
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # TypeError: a single array
        kind = type(error).__name__
        raise InputError(
            f"{path}: cannot be read as .npz ({kind}); give an .npz with mu and sigma, or images"
        ) from error
    if lacking := {"mu", "sigma"} - set(found):
        raise InputError(f"{path}: holds no {lacking.pop()}; statistics are mu and sigma")
    made_with = str(found.get("features", weights_sha256))
    if made_with != weights_sha256:
        raise InputError(
            f"{path}: was made with other weights ({made_with[:8]}…, not {weights_sha256[:8]}…); "
            "make it anew with `qexport score REAL --inception FILE --save FILE`"
        )
    mu_D, cov_DD = _numbers(path, "mu", found["mu"]), _numbers(path, "sigma", found["sigma"])
    if mu_D.shape != (width,) or cov_DD.shape != (width, width):
        raise InputError(
            f"{path}: mu {mu_D.shape} and sigma {cov_DD.shape} are of other features; "
            f"they must be ({width},) and ({width}, {width})"
        )
    if np.abs(cov_DD - cov_DD.T).max() > SYMMETRY_TOLERANCE * np.abs(cov_DD).max() or (np.diag(cov_DD) < 0).any():
        raise InputError(f"{path}: sigma is no covariance, it is not symmetric or has negative variances")
    images = int(found["images"]) if "images" in found and found["images"].size == 1 else None
    return Statistics(mu_D, (cov_DD + cov_DD.T) / 2, images, path.name)


def write_statistics(file: BinaryIO, statistics: Statistics, weights_sha256: str) -> None:
    """Write an .npz that `read_statistics` and other tools read."""
    np.savez(
        file,
        mu=statistics.mu,
        sigma=statistics.cov,
        images=np.int64(statistics.images or 0),
        features=np.str_(weights_sha256),
    )


def _numbers(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise InputError(f"{path}: {name} is {array.dtype} or not finite; statistics are finite floating-point numbers")
    return array.astype(np.float64)
