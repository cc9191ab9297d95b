"""`qexport quantize`: from a model's name to a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.family import random_seed
from qexport_cli.options import CheckpointOption, JsonOption, VaeCheckpointOption
from qexport_cli.progress import speaks, work
from qexport_cli.quantize_choice import choose
from qexport_cli.quantize_result import figures_of, show
from qexport_cli.render import print_json, print_note

if TYPE_CHECKING:
    from qexport.family import ModelEntry


def quantize(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="A name that `qexport models` lists; or --checkpoint tells."),
    ] = None,
    wbits: Annotated[
        int | None,
        typer.Option(metavar="BITS", help="Bits of a weight: 2, 3, 4, 6, 8, or 16 to keep them (default 4)."),
    ] = None,
    abits: Annotated[
        int | None, typer.Option(metavar="BITS", help="Bits of an activation: 4, 8, or 16 to keep them (default 16).")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Weights that share a scale (default 32; 8 bits: a whole row).")
    ] = None,
    number_format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="int (default), fp8 (E4M3) or fp8-e5m2, both 8 bits wide."),
    ] = None,
    act_scales: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Scales of activations: static (default), step or token (dynamic)."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="rtn (default; gptq with --topkld), mse, gptq, awq, smoothquant, smoothquant+gptq, awq+gptq, ternary; "
            "or auto: mixed.",
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(metavar="BITS", help="With --method auto: bits a weight, scales included.")
    ] = None,
    target_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="With --method auto: bytes of all matrices instead.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Try these methods, print one table, and write the best as the bundle."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--calibration-samples",
            metavar="N",
            help="Images the model samples to calibrate (default 8 to 64, by size).",
        ),
    ] = None,
    calibration_data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Calibrate on these images (folder or .npz), not on the model's own."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of calibration and of --topkld (default 0).")] = None,
    decoder_wbits: Annotated[
        int | None, typer.Option(metavar="BITS", help="Weights of the decoder's convolutions: 8 or 16 (default 16).")
    ] = None,
    decoder_abits: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="What flows into them and out: 8 or 16 (default 16). Fast after lower --target ort-cpu.",
        ),
    ] = None,
    topkld: Annotated[
        bool,
        typer.Option("--topkld", help="Fine-tune the result: the full-precision model teaches its quantised self."),
    ] = False,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS",
            help="With --topkld: split (default), mixed, boosted; baselines forward, reverse, js, logit-mse, "
            "cross-entropy.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="With --topkld: the teacher's likeliest tokens (default 900).")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="With --topkld: updates (default 800).")] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="With --topkld: samples of an update (default 8).")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="With --topkld: rate, relative to each matrix's size (default: by its error)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="With --topkld: learn on these images (folder or .npz), not on the model's own."
        ),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            metavar="NAME=VALUE",
            help="With --topkld, repeatable: any other setting, say rest_lr=0.005 or recompute (docs/topkld.md).",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --topkld: where to train, cpu (default) or cuda.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Layer by layer from a TOML file, instead of the above.")
    ] = None,
    checkpoint: CheckpointOption = None,
    vae_checkpoint: VaeCheckpointOption = None,
    random_weights: Annotated[
        int | None,
        typer.Option("--random-weights", metavar="SEED", help="Random numbers instead of weights; engineering only."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to (default ./qexport-out/<model>-<scheme>).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Quantise a model to an ONNX bundle, which runs without PyTorch."""
    start_s = time.perf_counter()
    chosen = choose(
        {
            "--wbits": wbits,
            "--abits": abits,
            "--group-size": group_size,
            "--format": number_format,
            "--act-scales": act_scales,
            "--method": method,
            "--target-bits": target_bits,
            "--target-bytes": target_bytes,
            "--compare": compare,
            "--calibration-samples": samples,
            "--seed": seed,
            "--decoder-wbits": decoder_wbits,
            "--decoder-abits": decoder_abits,
        },
        recipe,
        {
            "--topkld": topkld or None,
            "--variant": variant,
            "--top-k": top_k,
            "--steps": steps,
            "--batch": batch,
            "--lr": lr,
            "--data": data,
            "--train": train or None,
            "--device": device,
        },
    )

    from qexport.pipeline import quantize as run

    with work() as report:
        bundle = run(
            model,
            request=chosen.request,
            recipe=chosen.recipe,
            training=chosen.training,
            checkpoint=checkpoint,
            vae_checkpoint=vae_checkpoint,
            random_weights=random_weights,
            calibration_data=calibration_data,
            out=out,
            overwrite=overwrite,
            progress=report,
            loaded=lambda entry: _announce(entry, recognised=model is None),
            note=print_note,
        )
    if not speaks():
        return
    figures = figures_of(bundle, time.perf_counter() - start_s)
    if json:
        print_json(figures)
    else:
        show(bundle, figures)


def _announce(entry: ModelEntry, recognised: bool) -> None:
    """What one should know of the weights before anything is made of them."""
    if recognised:
        print_note(f"recognised: {entry.name}")
    if random_seed(entry.source) is not None:
        print_note(f"warning: {entry.source}")
    if entry.licence_note:
        print_note(entry.licence_note)
