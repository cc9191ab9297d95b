"""Images as PNG files: single ones, and a grid of many. The same pixels give the same bytes; no clock is stored.

Shapes: images_NCHW are float32 in [0, 1] as the runtime gives them, pixels_NHWC are uint8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qexport.errors import InputError
from qexport.runtime.pixels import to_pixels
from qexport_cli.files import new_file

VISIBLE_PIXELS = 128
"""Images narrower than this are enlarged in a grid, so that 32 × 32 ones can be seen."""


def finite_pixels(images_NCHW: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Pixels (n, H, W, 3) uint8, see `qexport.runtime.pixels.to_pixels`.

    Raises:
        InputError: a value is not finite, so the model or its inputs went out of range.
    """
    if not np.isfinite(images_NCHW).all():
        raise InputError("the bundle computed values that are not finite; try a smaller --cfg or --provider cpu")
    return to_pixels(images_NCHW)


def default_scale(width: int) -> int:
    """By how much a grid enlarges images of that width."""
    return max(1, VISIBLE_PIXELS // width)


def write_png(path: Path, pixels_HWC: npt.NDArray[np.uint8], texts: Mapping[str, str]) -> None:
    """Write one PNG, all or nothing: under another name first, then renamed. `texts` go into text chunks.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    with new_file(path) as partial, partial.open("wb") as file:
        Image.fromarray(pixels_HWC).save(file, format="PNG", pnginfo=info)
