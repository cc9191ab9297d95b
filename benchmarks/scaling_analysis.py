"""Why VAR and DiT keep, or lose, what they do when weights are rounded to 4, 3 and 2 bits.

    python benchmarks/scaling_analysis.py --images cifar_test.npz

Round to nearest, groups of 32, block matrices; torch on the CPU in float32, no bundle. Sections (`--sections`):
`middle` (error of the residual stream), `flips` (VAR: errors before and after the draw), `flips_between` (widths
against each other), `control` (DiT: clean latents put onto a k-means codebook), `control_fd` (FD of these), `kinds`
(sensitivity per kind of layer), `moderators` (guidance and filters). Every figure has a 95 % interval, by drawing
images with replacement. Each section is written to results/scaling_analysis.json when it is done and not measured
again; `--again` does. At the end all figures are drawn: results/scaling_analysis-*.svg and .png. The data set is
read, never copied.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qexport.compare import make_judge
from qexport.family import Generator, find_model
from qexport.scaling.analysis import plots
from qexport.scaling.analysis.codebook import Codebook
from qexport.scaling.analysis.draws import Draws, at_equal_kl
from qexport.scaling.analysis.flips import flips
from qexport.scaling.analysis.kinds import sensitivity_of_kinds
from qexport.scaling.analysis.middle import middle_errors
from qexport.scaling.analysis.moderators import fd_difference, moderator_rows
from qexport.scaling.analysis.rediscretise import EACH, NONE, controls, decoded
from qexport.scaling.analysis.resampled import to_json
from qexport.scaling.analysis.subject import rounded
from qexport.verify.environment import describe_environment
from qexport.verify.fd import measure_fd
from qexport.verify.images import open_images

RESULTS = Path(__file__).parent / "results" / "scaling_analysis.json"
MODELS = ("var-c10-d2", "dit-c10-d2")
CODES = (64, 1024)
CODEBOOK_IMAGES, JUDGED_IMAGES = 200, 50
ENCODE_BATCH = 50


class Bench:
    """One model, and its rounded versions as they are needed."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        family, entry = find_model(name)
        self.full, self.options = family.load(entry, None, None), options
        self._rounded: dict[int, Generator] = {}

    def rounded(self, bits: int) -> Generator:
        """The model at so many bits."""
        if bits not in self._rounded:
            self._rounded[bits] = rounded(self.full, bits)
        return self._rounded[bits]

    def middle(self) -> Any:
        """Width → errors of the residual stream."""
        samples = self.options.samples
        return {
            bits: middle_errors(self.full, self.rounded(bits), samples=samples).to_json() for bits in self.options.bits
        }

    def flips(self) -> Any:
        """Width → what draws make of errors; None for a model that draws nothing."""
        if self.full.draw is None:
            return None
        return {
            bits: {
                "overall": to_json(draws.overall()),
                "per_call": to_json(draws.per_call()),
                "by_error": to_json(draws.by_error()),
                "n": draws.samples,
            }
            for bits, draws in self.drawn.items()
        }

    def flips_between(self) -> Any:
        """Growth of errors from each width to each later one, and flips between them at equal KL; None as above."""
        if self.full.draw is None:
            return None
        result = {}
        for one, other in itertools.combinations(self.drawn, 2):
            few, many = self.drawn[other].overall(), self.drawn[one].overall()
            growth = {name: few[name] / many[name] for name in ("kl", "soft", "race_hard")}
            equal_kl = at_equal_kl(self.drawn[one], self.drawn[other])
            result[f"W{one} to W{other}"] = to_json({**growth, "race_flip_at_equal_kl": equal_kl})
        return result

    @cached_property
    def drawn(self) -> dict[int, Draws]:
        """Width → every draw."""
        samples = self.options.samples
        return {bits: flips(self.full, self.rounded(bits), samples=samples) for bits in self.options.bits}

    def control(self) -> Any:
        """Codebook → ways of a denoiser; None for a model that does not denoise."""
        if self.full.denoise is None:
            return None
        result: dict[str, Any] = {"codebook_images": len(self.latents)}
        for count in CODES:
            book = Codebook.of_latents(self.latents, count)
            ways = {
                bits: [c.to_json() for c in controls(self.full, self.rounded(bits), book, samples=self.options.samples)]
                for bits in self.options.bits
            }
            result[str(count)] = {"distortion": book.distortion(self.latents), "ways": ways}
        return result

    def control_fd(self) -> Any:
        """FD of what a denoiser makes on two of the ways; None as above, and without --fd."""
        if self.full.denoise is None or self.full.features is None or not self.options.fd:
            return None
        book = Codebook.of_latents(self.latents, CODES[-1])
        found = {}
        for label, model in [("fp", self.full), *((f"W{bits}", self.rounded(bits)) for bits in self.options.bits)]:
            for way in (NONE, EACH):
                images = decoded(model, book, way, images=self.options.fd)
                found[label, way] = measure_fd(images, self.full.features, 0)
        result = {f"{label} {way}": fd.to_json() for (label, way), fd in found.items()}
        for label in dict.fromkeys(label for label, _ in found):
            result[f"{label} {EACH} over {NONE}"] = fd_difference(found[label, EACH], found[label, NONE])
        return result

    @cached_property
    def latents(self) -> torch.Tensor:
        """Of real images, for codebooks."""
        assert self.full.denoise is not None
        encode = self.full.denoise.model.encode
        batches = self.images(CODEBOOK_IMAGES).batches(ENCODE_BATCH)
        return torch.cat([encode(torch.from_numpy(pixels)) for pixels, _ in batches])

    def kinds(self) -> Any:
        """Cost of single layers, on real images."""
        images = self.images(JUDGED_IMAGES)
        judge = make_judge(self.full, images=self.options.images, every=self.every(JUDGED_IMAGES), per_image=True)
        kinds, layers = sensitivity_of_kinds(self.full, judge)
        return {
            "n": len(images),
            "kinds": [kind.to_json() for kind in kinds],
            "layers": [layer.row.to_json() for layer in layers],
        }

    def moderators(self) -> Any:
        """One row a setting of the sampler."""
        versions = {f"W{bits}": self.rounded(bits) for bits in self.options.bits}
        rows = []
        for row in moderator_rows(self.full, versions, samples=self.options.samples, images=self.options.fd):
            rows.append(row)
            print(json.dumps(row), flush=True)
        return rows

    def every(self, images: int) -> int:
        """Which share of the images are about so many."""
        entry = self.full.entry
        there = len(open_images(self.options.images, size=entry.image_size, num_classes=entry.num_classes))
        return max(1, there // images)

    def images(self, count: int) -> Any:
        """About so many of the images, spread over all classes."""
        entry = self.full.entry
        size, classes = entry.image_size, entry.num_classes
        return open_images(self.options.images, size=size, num_classes=classes, every=self.every(count))


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "middle": Bench.middle,
    "flips": Bench.flips,
    "flips_between": Bench.flips_between,
    "control": Bench.control,
    "control_fd": Bench.control_fd,
    "kinds": Bench.kinds,
    "moderators": Bench.moderators,
}


def written(data: Any) -> str:
    """JSON text, lists of numbers on one line each."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def draw(data: dict[str, Any], folder: Path) -> None:
    """All figures that the results allow."""
    models = data["models"]
    for name, found in models.items():
        step = "scale" if "flips" in found else "step"
        stem = folder / f"scaling_analysis-{name}"
        if "middle" in found:
            widest = max(found["middle"], key=int)
            plots.save(plots.middle_figure(found["middle"][widest], step), stem.with_name(f"{stem.name}-middle"))
            plots.save(plots.widths_figure(found["middle"], step), stem.with_name(f"{stem.name}-widths"))
        if "flips" in found:
            plots.save(plots.flips_figure(found["flips"]), stem.with_name(f"{stem.name}-flips"))
        if "control" in found:
            control = found["control"][str(CODES[-1])]["ways"]
            widest = max(control, key=int)
            figure = plots.control_figure(control[widest], f"W{widest}, {CODES[-1]} codes")
            plots.save(figure, stem.with_name(f"{stem.name}-control"))
    kinds = {name: found["kinds"]["kinds"] for name, found in models.items() if "kinds" in found}
    if kinds:
        plots.save(plots.kinds_figure(kinds), folder / "scaling_analysis-kinds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10's test images: cifar_test.npz")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--bits", nargs="+", type=int, default=(4, 3, 2))
    parser.add_argument("--samples", type=int, default=20, help="trajectories")
    parser.add_argument("--fd", type=int, default=200, help="images for FD; 0 leaves it out")
    parser.add_argument("--again", action="store_true", help="measure what is there anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = json.loads(options.out.read_text()) if options.out.exists() else {"models": {}}
    data["environment"] = describe_environment("cpu")
    for name in options.models:
        found = data["models"].setdefault(name, {})
        bench: Bench | None = None
        for section in options.sections:
            if section in found and not options.again:
                continue
            bench = bench or Bench(name, options)
            measured = SECTIONS[section](bench)
            if measured is None:
                continue
            found[section] = json.loads(json.dumps(measured))
            found.setdefault("samples", {})[section] = options.samples
            temporary = options.out.with_suffix(".tmp")
            temporary.write_text(written(data))
            temporary.replace(options.out)
            print(f"{name}: {section} done", flush=True)
    draw(data, options.out.parent)


if __name__ == "__main__":
    main()
