"""The picture of the README: the same seeds drawn by one model at several widths, each row from its own bundle.

python benchmarks/picture.py --model var-c10-d4 --widths 16,8,4,2 --out docs/images/var-c10-d4.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qexport.pipeline import quantize
from qexport.runtime import load
from qexport.scheme import preset

ENLARGE = 2
GAP = 2
MARGIN = 70
CAPTIONS = {16: "fp16", 8: "int8", 4: "int4", 3: "int3", 2: "int2"}


def row(model: str, bits: int, labels: Sequence[int], seed: int, folder: Path) -> np.ndarray:
    """One strip of images: (H, n · W, 3) uint8, enlarged by nearest neighbour."""
    bundle = quantize(model, scheme=preset(bits), out=folder / f"w{bits}")
    images = load(bundle.path, provider="cpu", options="serve").generate(labels, seed=seed)
    pixels = np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    pixels = pixels.repeat(ENLARGE, axis=1).repeat(ENLARGE, axis=2)
    return np.concatenate([np.pad(p, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255) for p in pixels], axis=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="var-c10-d4")
    parser.add_argument("--widths", default="16,8,4,2")
    parser.add_argument("--classes", default="0,1,3,4,5,7,7,8,8,9")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    widths = [int(text) for text in args.widths.split(",")]
    labels = [int(text) for text in args.classes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        strips = [row(args.model, bits, labels, args.seed, Path(folder)) for bits in widths]
    grid = Image.fromarray(np.concatenate(strips))
    canvas = Image.new("RGB", (grid.width + MARGIN, grid.height + GAP), "white")
    canvas.paste(grid, (MARGIN, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(16)
    for i, bits in enumerate(widths):
        middle = i * strips[0].shape[0] + strips[0].shape[0] // 2
        draw.text((MARGIN - 12, middle), CAPTIONS[bits], fill="black", anchor="rm", font=font)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
