"""The same seeds at full precision, after post-training quantisation and after fine-tuning: one grid for each width.

    python benchmarks/topkld_pictures.py --model var-c10-d4 --wbits 2 3 [--steps 400] [--variant split] [--device cuda]

Writes docs/images/topkld-MODEL-wN.png. Rows: the full-precision model, what --start (GPTQ) makes of it, and the same
after --steps of fine-tuning (a denoiser: the control); under each name the figure on held-out samples of the teacher,
KL in nats or the relative output error. Everything is drawn by torch twins, which a bundle must agree with to 1e-4 of a
pixel's range (`qexport verify`), with the plan's own guidance. Training goes on from --work where it was cut off.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from qexport.distill import LOSSES, Distillation, DistillSettings, distill
from qexport.family import Generator
from qexport.methods import parse_method
from qexport.pipeline import load_generator
from qexport.recipe import recipe_for
from qexport.reference import torch_player
from qexport.reference.device import choose_device, placed, to_device
from qexport.reference.twin import quantised_twin
from qexport.runtime.pixels import BACKGROUND, GAP_PIXELS, to_pixels
from qexport.scheme import preset
from qexport.solve import solve
from qexport.training import Training, method_of
from qexport.verify.trajectory import label_inputs

IMAGES = Path(__file__).parents[1] / "docs" / "images"
ENLARGE = 2
MARGIN = 104
TITLES = {"topkld": "TopKLD", "output-mse": "fine-tuned"}


def strip(model: Generator, labels: np.ndarray, seed: int) -> np.ndarray:
    """One row of images: (H, n · W, 3) uint8, enlarged by repeating pixels."""
    images = torch_player(model).play(label_inputs(model.plan, labels), seed=seed, first_index=0)
    pixels = to_pixels(np.asarray(images)).repeat(ENLARGE, axis=1).repeat(ENLARGE, axis=2)
    edges = ((GAP_PIXELS, 0), (GAP_PIXELS, 0), (0, 0))
    return np.concatenate([np.pad(image, edges, constant_values=BACKGROUND) for image in pixels], axis=1)


def rows(plain: Generator, bits: int, options: argparse.Namespace) -> list[tuple[str, str, Generator]]:
    """(name, figure in words, model) of each row."""
    method = parse_method(options.start)
    recipe = recipe_for(preset(bits), plain.default_layers, f"w{bits}", method.algorithm, method.smooth)
    folded = copy.deepcopy(plain)
    solution = solve(folded, recipe)
    settings = DistillSettings(
        Distillation(options.variant), steps=options.steps, batch=options.batch, samples=options.samples,
        evaluate_every=max(1, options.steps // 8),
    )  # fmt: skip
    trained = distill(folded, recipe, solution, settings, work=options.work / "pictures", device=options.device)
    report = trained.report
    named = {"kl": "KL", "output_mse": "error"}[report["figure"]]
    title = method_of(plain, Training(settings))
    twins = (quantised_twin(plain, recipe, found).quantised for found in (solution, trained.solution))
    before, after = twins
    for twin in (before, after):
        to_device(twin, options.device)
    return [
        ("fp32", "", placed(plain, options.device)),
        (options.start.upper(), f"{named} {report['start']:.3g}", before),
        (TITLES.get(title, title), f"{named} {report['best']:.3g}", after),
    ]


def draw(shown: Sequence[tuple[str, str, np.ndarray]], title: str) -> Image.Image:
    """The strips under each other, with their names on the left."""
    large, small = ImageFont.load_default(15), ImageFont.load_default(12)
    grid = Image.fromarray(np.concatenate([pixels for _, _, pixels in shown]))
    head = 22
    canvas = Image.new("RGB", (grid.width + MARGIN, grid.height + GAP_PIXELS + head), "white")
    canvas.paste(grid, (MARGIN, head))
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN + GAP_PIXELS, head // 2), title, fill="black", anchor="lm", font=small)
    for number, (name, figure, pixels) in enumerate(shown):
        middle = head + number * pixels.shape[0] + pixels.shape[0] // 2
        pen.text((MARGIN - 10, middle - (9 if figure else 0)), name, fill="black", anchor="rm", font=large)
        pen.text((MARGIN - 10, middle + 9), figure, fill="#555555", anchor="rm", font=small)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-c10-d4")
    parser.add_argument("--wbits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--variant", default="split", choices=sorted(LOSSES))
    parser.add_argument("--start", default="gptq")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--classes", nargs="+", type=int, default=[0, 1, 3, 4, 5, 7, 7, 8, 8, 9])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="to train and draw on")
    parser.add_argument("--work", type=Path, default=Path("qexport-out") / "topkld-work")
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    choose_device(options.device, "--device")
    plain = load_generator(options.model)
    labels = np.array(options.classes, np.int64)
    options.out.mkdir(parents=True, exist_ok=True)
    for bits in options.wbits:
        shown = [(name, text, strip(model, labels, options.seed)) for name, text, model in rows(plain, bits, options)]
        path = options.out / f"topkld-{options.model}-w{bits}.png"
        title = f"{options.model}, {bits}-bit weights in groups of 32, {options.steps} steps of {options.batch}"
        draw(shown, title).save(path, optimize=True)
        print(path, *(f"{name}: {text}" for name, text, _ in shown if text), flush=True)


if __name__ == "__main__":
    main()
