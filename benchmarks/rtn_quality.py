"""What round-to-nearest costs the reference VARs: cross-entropy, KL and agreement at W8, W4, W3 and W2.

    python benchmarks/rtn_quality.py --images cifar_test.npz

Absmax scales, groups of 32 at every width, block matrices only; every 20th of CIFAR-10's 10,000 test images (500),
teacher forced, no guidance, torch on the CPU in float32. Writes rtn_quality.json and .md beside itself. Ten minutes on
two cores. The data set is read, never copied.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from qexport.family import find_model
from qexport.quantize import apply_stored, stored_weights
from qexport.recipe import recipe_for
from qexport.scheme import DEFAULT_GROUP_SIZE, preset
from qexport.verify.environment import describe_environment
from qexport.verify.images import open_images
from qexport.verify.quality import measure_quality, tokens_of, torch_student

MODELS = ("var-c10-d2", "var-c10-d3", "var-c10-d4")
BITS = (8, 4, 3, 2)
EVERY = 20
BATCH = 25


def measure(name: str, file: Path) -> dict:
    family, entry = find_model(name)
    full = family.load(entry, None, None)
    images = open_images(file, size=entry.image_size, num_classes=entry.num_classes, every=EVERY)
    batches: list[tuple[np.ndarray, np.ndarray]] = list(tokens_of(full, images, BATCH))
    rows = {}
    for bits in BITS:
        quantised = family.load(entry, None, None)
        scheme = preset(bits, group_size=DEFAULT_GROUP_SIZE)
        recipe = recipe_for(scheme, quantised.default_layers, scheme.name)
        apply_stored(quantised, stored_weights(full, recipe))
        found = measure_quality(
            full, torch_student(quantised), iter(batches), on_images=True, seed=None, source=images.source
        )
        rows[f"w{bits}"] = found.to_json()
        print(f"{name} w{bits}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.figures.items()), flush=True)
    return rows


def table(models: dict[str, dict]) -> str:
    lines = [
        "# VAR under round-to-nearest",
        "",
        "Cross-entropy / KL to the full-precision model (nats per token) / top-1 agreement / top-900 agreement, on 500",
        "CIFAR-10 test images, teacher forced, no guidance. Absmax, groups of 32, block matrices; torch, CPU, float32.",
        "",
        "| | fp | " + " | ".join(f"W{bits}" for bits in BITS) + " |",
        "|" + "---|" * (len(BITS) + 2),
    ]
    for name, rows in models.items():
        cells = [f"{rows[f'w{BITS[0]}']['cross_entropy_fp']:.4f}"]
        for bits in BITS:
            row = rows[f"w{bits}"]
            figures = (row["cross_entropy"], row["kl"], row["top1_agreement"], row["top900_agreement"])
            cells.append("{:.4f} / {:.4f} / {:.3f} / {:.3f}".format(*figures))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10's test images: cifar_test.npz")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    models = {name: measure(name, options.images) for name in MODELS}
    data = {"every": EVERY, "environment": describe_environment("cpu"), "models": models}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(models))


if __name__ == "__main__":
    main()
