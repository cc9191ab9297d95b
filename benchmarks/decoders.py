"""What a decoder of latents loses and gains by its format: bytes, PSNR, and milliseconds on the CPU provider.

    python benchmarks/decoders.py [--images 64] [--repeats 20] [--sd-vae] [--sd-vae-repeats 5]

var-c10-d4 and dit-c10-d4 draw latents at full precision (seed 0; DiT by ddim-25), one image of each class in turn, and
each form of the decoder makes pictures of the very same latents: fp32 (the captured graph with the checkpoint's own
numbers), fp16 (as a bundle stores it by default; computed in fp32), int8 weights with a scale per output channel,
rounded to nearest, those with static int8 inputs, and those with int8 outputs as well (what `--decoder-abits 8` makes),
in the portable graph and lowered to ort-cpu; calibrated on 64 images of seed 1. PSNR = −10 log₁₀ of the mean
squared difference to torch's float32 pixels in [0, 1], over all images together; 95 % interval of 2,000 bootstrap
samples of the images. Times: one thread, ``serve`` options, batches of 1 and 8, the forms in turns in one process,
median of `--repeats` and of the ratio to fp32 of the same turn, in processor time, so that a busy machine measures
about the same. Bytes are those of the weights in the file.

--sd-vae adds bytes and times (one image of 256 pixels) of the decoder that published DiTs use. Its weights are random,
so only its shapes count: no PSNR, and one image of one step is enough for calibration.
Writes results/decoders.json and .md. Seven minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from qexport.bundle import Bundle
from qexport.family import Generator, load_random
from qexport.graph import build
from qexport.graph.capture import capture
from qexport.lower import lower
from qexport.pipeline import load_generator, quantize
from qexport.quantize import stored_weights
from qexport.recipe import Calibration, Recipe, Rule
from qexport.reference import torch_player
from qexport.request import decoder_scheme
from qexport.runtime import Backend, CallRecord, load
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.session import make_session
from qexport.scheme import preset
from qexport.targets import QuantTraits, session_config
from qexport.totals import layer_row
from qexport.verify.environment import describe_environment
from qexport.verify.trajectory import label_inputs, labels_for

RESULTS = Path(__file__).parent / "results"
MODELS = {"var-c10-d4": Calibration(64, seed=1), "dit-c10-d4": Calibration(64, seed=1, schedule="ddim-25")}
SD_VAE = "dit-s-8-256"
"""The smallest model with that decoder."""
SD_VAE_SEED = 0
BATCHES = (1, 8)
DRAWN_AT_ONCE = 16
RESAMPLES = 2000
FP32, FP16, W8, W8A8 = "fp32", "fp16", "int8 weights", "int8 weights and inputs"
INT8, LOWERED = "int8 throughout", "int8 throughout, ort-cpu"
SCHEMES = {W8: decoder_scheme(8, 16), W8A8: preset(8, 8), INT8: decoder_scheme(8, 8)}
FORMS = (FP16, *SCHEMES)
"""Those that are a bundle."""


def recipe(generator: Generator, form: str, calibration: Calibration) -> Recipe:
    """The decoder in one form, everything else in fp16."""
    scheme = SCHEMES.get(form)
    if scheme is None:
        return Recipe("w16", ())
    pattern = next(iter(generator.decoder_layers)).partition("/")[0] + "/*"
    return Recipe("decoder", (Rule(pattern, scheme.weight, activation=scheme.activation),), calibration=calibration)


def decoder_of(generator: Generator) -> str:
    """The graph that makes pictures: the last call of the plan."""
    return generator.plan.calls[-1].graph


def latents(generator: Generator, images: int, schedule: str | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What flows into the decoder by port, (n, …), and the pixels (n, 3, H, W) that torch makes of it."""
    player, graph = torch_player(generator), decoder_of(generator)
    if schedule is not None:
        player = player.with_schedule(schedule)
    feeds: list[dict[str, np.ndarray]] = []
    pixels: list[np.ndarray] = []

    def observe(record: CallRecord[Tensor]) -> None:
        if record.graph == graph:
            feeds.append({port: value.numpy() for port, value in record.feeds.items()})
            pixels.append(next(iter(record.results.values())).numpy())

    labels = labels_for(images, generator.entry.num_classes)
    for first in range(0, images, DRAWN_AT_ONCE):
        player.play(
            label_inputs(player.plan, labels[first : first + DRAWN_AT_ONCE]), seed=0, first_index=first,
            observer=observe,
        )  # fmt: skip
    return {port: np.concatenate([feed[port] for feed in feeds]) for port in feeds[0]}, np.concatenate(pixels)


def psnr_db(found: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """PSNR over all images (n, 3, H, W) together, and its interval; None where they are the same."""
    error_N = ((found.astype(np.float64) - wanted) ** 2).reshape(len(found), -1).mean(axis=1)
    if not error_N.any():
        return {"psnr_db": None, "interval": None}
    picked = np.random.default_rng(0).integers(0, len(error_N), (RESAMPLES, len(error_N)))
    low, high = np.quantile(-10 * np.log10(error_N[picked].mean(axis=1)), (0.025, 0.975))
    return {"psnr_db": float(-10 * np.log10(error_N.mean())), "interval": [float(low), float(high)]}


def stored_bytes(file: Path) -> int:
    """Bytes of the weights that a graph of a bundle reads."""
    model = onnx.load(file, load_external_data=False)
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer]
    return sum(int(entry["length"]) for entry in entries if entry)


def size_bytes(generator: Generator, form: str) -> int:
    """The same without a bundle."""
    graph = decoder_of(generator)
    if form == FP32:
        return sum(4 * parameter.numel() for parameter in generator.graph(graph).parameters().values())
    rules = recipe(generator, form, Calibration())
    rows = [layer_row(weight) for weight in stored_weights(generator, rules) if weight.graph == graph]
    return sum(row["size_bytes"] for row in rows)


def float32_backend(generator: Generator, folder: Path) -> OrtBackend:
    """The decoder as it was captured, in float32."""
    graph = decoder_of(generator)
    model = capture(generator.graph(graph))
    build.normalise(model)
    flipped, parameters = build.transposed_parameters(model), generator.graph(graph).parameters()
    for initialiser, value in model.graph.initializers.items():
        if initialiser not in parameters:
            continue  # a constant of the graph itself
        array = parameters[initialiser].detach().numpy()
        value.const_value = ir.tensor(np.ascontiguousarray(array.T) if initialiser in flipped else array)
    folder.mkdir()
    ir.save(model, folder / f"{graph}.onnx")
    config = session_config("cpu", "serve", QuantTraits())
    return OrtBackend({graph: make_session(folder / f"{graph}.onnx", folder, config, 1)}, config.device)


def measure(name: str, calibration: Calibration, images: int, repeats: int) -> dict[str, Any]:
    generator = load_generator(name)
    graph = decoder_of(generator)
    feeds, wanted = latents(generator, images, calibration.schedule)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        backends, found = forms_of(generator, calibration, folder)
        for form, backend in backends.items():
            found[form] |= psnr_db(decode(backend, graph, feeds), wanted)
        for batch in BATCHES:
            for form, times in in_turns(backends, graph, feeds, batch, repeats).items():
                found[form][f"ms_{batch}"] = times
        del backends
    return {"images": images, "weights": found[FP32]["size_bytes"] // 4, "forms": found}


def measure_shapes(repeats: int) -> dict[str, Any]:
    """Bytes and times of a decoder of random weights."""
    generator = load_random(SD_VAE, SD_VAE_SEED)
    graph = decoder_of(generator)
    (port,) = generator.graph(graph).inputs
    sizes = [size if isinstance(size, int) else 1 for size in port.shape]
    feeds = {port.name: np.random.default_rng(0).normal(size=sizes).astype(np.float32)}
    with tempfile.TemporaryDirectory() as temporary:
        shortest = min(generator.plan.schedules, key=lambda name: int(name.rpartition("-")[2]))
        calibration = Calibration(1, seed=1, schedule=shortest)
        backends, found = forms_of(generator, calibration, Path(temporary), SD_VAE_SEED)
        for form, times in in_turns(backends, graph, feeds, 1, repeats).items():
            found[form]["ms_1"] = times
        del backends
    return {"model": SD_VAE, "forms": found}


def forms_of(
    generator: Generator, calibration: Calibration, folder: Path, random_weights: int | None = None
) -> tuple[dict[str, Backend[Any]], dict[str, dict[str, Any]]]:
    """Sessions of every form, one thread, and a row for each with its bytes."""
    graph = decoder_of(generator)
    backends: dict[str, Backend[Any]] = {FP32: float32_backend(generator, folder / "fp32")}
    found: dict[str, dict[str, Any]] = {FP32: {"size_bytes": size_bytes(generator, FP32)}}
    for form in FORMS:
        out = folder / form.replace(" ", "-")
        name, rules = generator.entry.name, recipe(generator, form, calibration)
        bundle = quantize(name, recipe=rules, out=out, random_weights=random_weights)
        backends[form] = load(out, "cpu", "serve", threads=1).player.backend
        found[form] = {"size_bytes": stored_bytes(bundle.graph_files(None)[graph])}
        if form == INT8:
            lower(out, "ort-cpu")
            backends[LOWERED] = load(out, "cpu", "serve", threads=1, target="ort-cpu").player.backend
            found[LOWERED] = {"size_bytes": stored_bytes(Bundle.open(out).graph_files("ort-cpu")[graph])}
    return backends, found


def decode(backend: Backend[Any], graph: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    put = {port: backend.put(value) for port, value in feeds.items()}
    (port,) = backend.outputs(graph)
    return backend.get(backend.run(graph, put, (port,))[port])


def in_turns(
    backends: dict[str, Backend[Any]], graph: str, feeds: dict[str, np.ndarray], batch: int, repeats: int
) -> dict[str, dict[str, float]]:
    some = {port: np.ascontiguousarray(value[:batch]) for port, value in feeds.items()}
    times: dict[str, list[float]] = {form: [] for form in backends}
    for turn in range(repeats + 2):
        for form, backend in backends.items():
            start = time.process_time()
            decode(backend, graph, some)
            if turn >= 2:  # the first two warm up
                times[form].append((time.process_time() - start) * 1e3)
    base = np.array(times[FP32])
    return {
        form: {
            "median": float(np.median(spent)),
            "least": min(spent),
            "greatest": max(spent),
            "ratio_to_fp32": float(np.median(np.array(spent) / base)),
        }
        for form, spent in times.items()
    }


def table(models: dict[str, Any], sd_vae: dict[str, Any] | None, load_average: float) -> str:
    lines = [
        "# Decoders by format",
        "",
        "Made by `python benchmarks/decoders.py --sd-vae`; its header says how. PSNR against torch in float32, 95 %",
        "bootstrap interval over images; ms of processor time, one thread, and × fp32 in the same turn (below 1 is",
        "faster). Fp16 computes what fp32 does: the bundled decoders' weights are float16 numbers already.",
        f"Load average at the end {load_average:.1f} on {os.cpu_count()} processors.",
        "",
        "| decoder | form | MB | PSNR, dB | ms, 1 image | × fp32 | ms, 8 images | × fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        for form, row in model["forms"].items():
            psnr = (
                "same" if row["psnr_db"] is None else "{:.1f} ({:.1f}–{:.1f})".format(row["psnr_db"], *row["interval"])
            )
            cells = [f"of {name}", form, f"{row['size_bytes'] / 1e6:.2f}", psnr]
            for batch in BATCHES:
                cells += [f"{row[f'ms_{batch}']['median']:.1f}", f"{row[f'ms_{batch}']['ratio_to_fp32']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    for form, row in (sd_vae or {}).get("forms", {}).items():
        cells = ["sd-vae's shapes", form, f"{row['size_bytes'] / 1e6:.2f}", "not measured: random weights"]
        cells += [f"{row['ms_1']['median']:.0f}", f"{row['ms_1']['ratio_to_fp32']:.2f}", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sd-vae", action="store_true")
    parser.add_argument("--sd-vae-repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoders.json")
    options = parser.parse_args()
    models = {name: measure(name, MODELS[name], options.images, options.repeats) for name in options.models}
    sd_vae = measure_shapes(options.sd_vae_repeats) if options.sd_vae else None
    load_average = os.getloadavg()[0]
    data = {
        "environment": describe_environment("cpu"),
        "threads": 1,
        "load_average": load_average,
        "repeats": options.repeats,
        "models": models,
        "sd_vae": sd_vae,
    }
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(models, sd_vae, load_average))


if __name__ == "__main__":
    main()
