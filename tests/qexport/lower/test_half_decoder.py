"""A decoder in float16: its range is measured before, its pictures stay, and a range that does not fit is refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
from half_rounding import rounded_session

import qexport.runtime as runtime
from qexport.bundle import Bundle
from qexport.bundle.manifest import digest_of
from qexport.errors import UnsupportedError
from qexport.lower import lower
from qexport.lower.decoder_range import LIMIT
from qexport.targets.keys import DTYPE_KEY
from qexport.verify import limits
from qexport.verify.ladder import verify

BUNDLES = ("w4_bundle", "dit_bundle")
LEAST_PSNR_DB = 70
"""Measured: 79 dB for both. 50 dB would be four fifths of a grey level in the mean square."""


def dtype_of(path, graph: str) -> str | None:
    model = onnx.load(str(path / f"targets/ort-cuda/{graph}.onnx"), load_external_data=False)
    return next((entry.value for entry in model.metadata_props if entry.key == DTYPE_KEY), None)


def decoded(path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Latents that the bundle draws, and the pictures that its portable decoder makes of them."""
    loaded = runtime.load(path, provider="cpu", threads=1)
    player, found = loaded.player, []
    if loaded.bundle.plan.schedules:
        player = player.with_schedule("ddim-10")

    def observe(record) -> None:
        if record.graph == "decode":
            (latent,), image = record.feeds.values(), record.results["image"]
            found.append(tuple(np.array(player.backend.get(value)) for value in (latent, image)))

    player.play({"label": np.arange(10)}, seed=5, batch=10, observer=observe)
    return found


@pytest.mark.parametrize("name", BUNDLES)
def test_the_range_is_measured_and_reported(request, copied, name):
    path = copied(request.getfixturevalue(name))
    report = lower(path, "ort-cuda", decoder_dtype="float16")
    found = report.decoder_range
    assert found is not None
    assert 1 < found.greatest < found.limit == LIMIT
    written = json.loads((path / "reports/lower-ort-cuda.json").read_text())
    assert (written["decoder_dtype"], written["decoder_range"]["node"]) == ("float16", found.node)
    assert dtype_of(path, "decode") == "float16"
    ports = runtime.load(path, provider="cpu", threads=1, target="ort-cuda").player.backend.inputs("decode")
    assert {port.dtype for port in ports.values()} == {"float32"}


@pytest.mark.parametrize("name", BUNDLES)
def test_pictures_with_every_value_rounded(request, name):
    path = request.getfixturevalue(name).path
    session = rounded_session(path, "decode")
    (port,) = session.get_inputs()
    errors = [session.run(["image"], {port.name: latent})[0] - image for latent, image in decoded(path)]
    assert 0 < np.abs(errors).max() < limits.FP16_DECODER_IMAGE_MAX_ABS
    assert -10 * np.log10(np.mean(np.square(errors, dtype=np.float64))) > LEAST_PSNR_DB


def test_float32_by_default(w4_bundle, copied):
    path = copied(w4_bundle)
    report = lower(path, "ort-cuda")
    assert (report.decoder_dtype, report.decoder_range) == ("float32", None)
    assert dtype_of(path, "decode") != "float16"


def test_only_the_decoder(w4_bundle, copied):
    path = copied(w4_bundle)
    lower(path, "ort-cuda", dtype="float32", decoder_dtype="float16")
    assert (dtype_of(path, "step"), dtype_of(path, "decode")) == ("float32", "float16")


def test_a_range_that_does_not_fit_is_refused_and_nothing_is_written(w4_bundle, copied):
    path = copied(w4_bundle)
    fill_bias(path, "decoder.conv_in.bias", 4 * LIMIT)
    before = Bundle.open(path).manifest.digest
    with pytest.raises(UnsupportedError, match=r"reaches \d+,\d{3} at decoder\..*takes 8,188"):
        lower(path, "ort-cuda", decoder_dtype="float16")
    assert Bundle.open(path).manifest.digest == before
    assert lower(path, "ort-cuda", decoder_dtype="float16", measure_decoder=False).decoder_range is None


def fill_bias(path, name: str, number: float) -> None:
    """Fill a vector of the decoder with one number, and put its file's hash right."""
    model = onnx.load(str(path / "decode.onnx"), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    file, start, length = path / place["location"], int(place["offset"]), int(place["length"])
    content = bytearray(file.read_bytes())
    content[start : start + length] = np.full(length // 4, number, np.float32).tobytes()
    file.write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"][place["location"]]["sha256"] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))


@pytest.mark.parametrize(
    ("name", "dtype", "schedule"), [("w4_bundle", "float32", None), ("dit_bundle", "float16", "ddim-10")]
)
def test_verify_has_limits_for_it(request, copied, name, dtype, schedule):
    path = copied(request.getfixturevalue(name))
    lower(path, "ort-cuda", dtype=dtype, decoder_dtype="float16")
    few = {"samples": 2, "batch": 2, "speed": False, "reports": False, "provider": "cpu"}
    report = verify(path, target="ort-cuda", schedule=schedule, **few)
    assert report.passed, [check for check in report.checks if not check.passed]
    checks = {check.name: check for check in report.checks}
    picture = checks["decode image: largest difference"]
    assert limits.FP32_IMAGE_MAX_ABS < picture.value < picture.limit == limits.FP16_DECODER_IMAGE_MAX_ABS


def test_targets_without_float16(w4_bundle, copied):
    with pytest.raises(UnsupportedError, match="decoders of ort-cpu compute in float32, not in float16"):
        lower(copied(w4_bundle), "ort-cpu", decoder_dtype="float16")
