"""The command: arguments, progress lines on stderr, exit codes as everywhere (0 done, 2 wrong input)."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.errors import InputError, QexportError
from qexport_models.train.recipe import KINDS, Recipe, default_recipe

if TYPE_CHECKING:
    from qexport_models.train.trainer import Progress

LOG_EVERY = 50
"""Steps between progress lines; the loss that is written beside the weights is a mean over as many."""

_SETTINGS = ("steps", "batch", "lr", "weight_decay", "ema", "warmup", "clip", "seed", "bf16")


def parser() -> argparse.ArgumentParser:
    """The arguments; defaults that depend on the model are in `default_recipe`."""
    found = argparse.ArgumentParser(
        prog="python -m qexport_models.train", description="Train a reference model on 32 × 32 images of ten classes."
    )
    found.add_argument("kind", choices=KINDS)
    found.add_argument("--data", type=Path, required=True, help=".npz (data, off, lab or images, labels), or a folder")
    found.add_argument("--out", type=Path, required=True, help="weights, fp16 .safetensors")
    found.add_argument("--depth", type=int, default=2, help="of VAR or DiT")
    found.add_argument("--init", type=Path, help="weights to go on from")
    found.add_argument("--vae", type=Path, help="frozen autoencoder of VAR or DiT; default: the bundled one")
    found.add_argument("--featurenet", type=Path, help="of the perceptual term; default: the bundled one")
    found.add_argument("--judge", type=Path, help="images to judge the result on")
    found.add_argument("--work", type=Path, help="folder for checkpoints; default: OUT.training")
    found.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--steps", type=int, help="updates; 0 only judges")
    found.add_argument("--batch", type=int)
    found.add_argument("--lr", type=float)
    found.add_argument("--weight-decay", type=float)
    found.add_argument("--ema", type=float)
    found.add_argument("--warmup", type=int)
    found.add_argument("--clip", type=float)
    found.add_argument("--seed", type=int)
    found.add_argument("--bf16", action="store_true", default=None, help="products in bfloat16")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train as told.

    Returns:
        0, or 2 after one line on stderr.
    """
    arguments = parser().parse_args(argv)
    try:
        train(arguments)
    except QexportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def train(arguments: argparse.Namespace) -> None:
    """Read, train, judge, write.

    Raises:
        InputError: an argument or a file does not fit; nothing is written then.
    """
    recipe = _recipe(arguments)
    _check(arguments)
    import torch

    from qexport.distill.checkpoints import Checkpoints, key_of
    from qexport_models.train.data import read_images
    from qexport_models.train.trainer import Trainer, judge
    from qexport_models.train.weights import make_task, save_weights

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    task = make_task(recipe, arguments.init, arguments.vae, arguments.featurenet)
    held_out = read_images(arguments.judge)[0] if arguments.judge else None
    images, digest = read_images(arguments.data)
    # Files decide the result as the recipe does; another device gives other roundings.
    files = [_digest(getattr(arguments, name)) for name in ("init", "vae", "featurenet")]
    key = key_of(version("qexport"), recipe.to_json(), digest, files, arguments.device)
    work = arguments.work or arguments.out.with_name(f"{arguments.out.name}.training")
    trainer = Trainer(
        task, images, recipe, device=arguments.device, checkpoints=Checkpoints(work, key) if recipe.steps else None,
        checkpoint_every=arguments.checkpoint_every, encoding=_encoding(),
    )  # fmt: skip
    if trainer.step:
        _say(f"{trainer.step} of {recipe.steps} steps were done")
    trainer.run(_progress(recipe))
    metadata = {"steps": str(recipe.steps), "batch": str(recipe.batch), "seed": str(recipe.seed)}
    if trainer.losses:
        last = trainer.losses[-LOG_EVERY:]
        metadata["loss"] = f"{sum(last) / len(last):.4f}"
    metadata |= task.metadata(images.plain[:1000].to(arguments.device))
    if held_out is not None:
        found = judge(task, held_out, min(recipe.batch, 100), recipe.seed)
        line = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        metadata["judged"] = f"{line} on {len(held_out)} images"
        _say(f"judged: {metadata['judged']}")
    save_weights(task.module, arguments.out, metadata)
    _say(f"wrote {arguments.out}; {work} may be deleted" if recipe.steps else f"wrote {arguments.out}")


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = {name: getattr(arguments, name) for name in _SETTINGS if getattr(arguments, name) is not None}
    return replace(default_recipe(arguments.kind, arguments.depth), **given)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would only be noticed after hours."""
    if arguments.checkpoint_every < 1:
        raise InputError(f"--checkpoint-every {arguments.checkpoint_every}: must be at least 1")
    if arguments.out.is_dir() or not arguments.out.resolve().parent.is_dir():
        raise InputError(f"--out {arguments.out}: is a folder or lies in none; give a file in a folder that exists")
    for name, kinds in (("vae", ("var", "dit")), ("featurenet", ("vqvae", "klvae"))):
        path = getattr(arguments, name)
        if path is not None and arguments.kind not in kinds:
            raise InputError(f"--{name} means something for {' and '.join(kinds)} only; leave it out")
    for name in ("init", "vae", "featurenet"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise InputError(f"--{name} {path}: no such file")


def _digest(path: Path | None) -> str:
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _progress(recipe: Recipe) -> Progress:
    start_s, first = time.perf_counter(), [0]

    def tell(done: int, terms: dict[str, float]) -> None:
        first[0] = first[0] or done - 1
        if done % LOG_EVERY == 0 or done == recipe.steps:
            left_s = (time.perf_counter() - start_s) / (done - first[0]) * (recipe.steps - done)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in terms.items())
            _say(f"step {done} of {recipe.steps}: {shown}; {left_s / 60:.0f} min left")

    return tell


def _encoding() -> Callable[[int, int], None]:
    """A line for every tenth of the images that a frozen autoencoder has gone through."""
    told = [0]

    def tell(done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth > told[0]:
            told[0] = tenth
            _say(f"encoded {done} of {total} images, mirrored ones included")

    return tell


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
