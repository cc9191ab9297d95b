"""The same seeds at full precision, after post-training quantisation and after fine-tuning: one grid for each width.

    python benchmarks/topkld_pictures.py --model var-c10-d4 --schemes ternary W2 W3 W4 [--steps 400]
        [--variant split] [--device cuda]

Writes docs/images/topkld-MODEL-SCHEME.png. Rows: the full-precision model, what --start (GPTQ) makes of it, and this
after --steps of fine-tuning (a denoiser: the control); under each name the figure on held-out samples of the teacher,
KL in nats or the relative output error. Everything is drawn by torch twins, which a bundle must agree with to 1e-4 of a
pixel's range (`qexport verify`), with the plan's own guidance. Starts and samples are those of topkld_quality.py where
it has left them in --work, and training goes on from there where it was cut off: the same settings, the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from topkld_bench import Bench, recipe_of
from topkld_jobs import LOSSES, SCHEMES, Sweep, jobs_of
from topkld_quality import settings_of

from qexport.distill import distill
from qexport.family import Generator
from qexport.reference import torch_player
from qexport.reference.device import choose_device, to_device
from qexport.reference.twin import quantised_twin
from qexport.runtime.pixels import BACKGROUND, GAP_PIXELS, to_pixels
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


def rows(bench: Bench, scheme: str, options: argparse.Namespace) -> list[tuple[str, str, Generator]]:
    """(name, figure in words, model) of each row."""
    recipe = recipe_of(bench.plain, SCHEMES[scheme], options.start)
    folded, solution, _ = bench.start(recipe)
    asked = {"losses": (options.variant,), "seeds": (0,), "steps": options.steps, "batch": options.batch}
    sweep = Sweep((bench.name,), (scheme,), samples=options.samples, start=options.start, baselines=False, **asked)
    (job,) = jobs_of([sweep])
    settings, data = settings_of(job), bench.samples(sweep, 0)
    trained = distill(
        folded, recipe, solution, settings, data=data, work=options.work / "pictures", device=options.device
    )
    report = trained.report
    named = {"kl": "KL", "output_mse": "error"}[report["figure"]]
    title = method_of(bench.plain, Training(settings))
    before, after = (
        to_device(quantised_twin(bench.plain, recipe, found).quantised, options.device)
        for found in (solution, trained.solution)
    )
    return [
        ("fp32", "", bench.full),
        (options.start.upper(), f"{named} {report['start']:.3g}", before),
        (TITLES.get(title, title), f"{named} {report['best']:.3g}", after),
    ]


def words(scheme: str) -> str:
    """A scheme for people: ``2-bit weights in groups of 32``."""
    base, _, size = scheme.partition(" g")
    weights, _, inputs = base.removeprefix("W").partition("A")
    named = "ternary" if base == "ternary" else f"{weights}-bit"
    return f"{named} weights in groups of {size or 32}" + (f", {inputs}-bit inputs" if inputs else "")


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
    parser.add_argument("--schemes", nargs="+", default=["W2", "W3"], choices=list(SCHEMES))
    parser.add_argument("--variant", default="split", choices=LOSSES)
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
    options = parser.parse_args(namespace=argparse.Namespace(images=None))
    torch.set_num_threads(options.threads)
    choose_device(options.device, "--device")
    bench = Bench(options.model, options)
    labels = np.array(options.classes, np.int64)
    options.out.mkdir(parents=True, exist_ok=True)
    for scheme in options.schemes:
        shown = [(name, text, strip(model, labels, options.seed)) for name, text, model in rows(bench, scheme, options)]
        path = options.out / f"topkld-{options.model}-{scheme.lower().replace(' ', '-')}.png"
        title = f"{options.model}, {words(scheme)}, {options.steps} steps of {options.batch}"
        draw(shown, title).save(path, optimize=True)
        print(path, *(f"{name}: {text}" for name, text, _ in shown if text), flush=True)


if __name__ == "__main__":
    main()
