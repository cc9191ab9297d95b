"""`verify --target`: the ladder climbs the lowered graphs, and falls where one of their weights is wrong."""

from __future__ import annotations

import hashlib
import json

import onnx
import pytest

from qexport.bundle.manifest import digest_of
from qexport.errors import InputError
from qexport.lower import lower
from qexport.pipeline import quantize
from qexport.request import Request
from qexport.scheme import preset
from qexport.verify import limits
from qexport.verify.ladder import verify

FEW = {"samples": 2, "batch": 2, "speed": False, "reports": False, "provider": "cpu"}
CHANGED = "targets/ort-cuda/weights.data"


def test_a_lowered_bundle_is_verified_and_a_damaged_one_fails(w4_bundle, copied):
    path = copied(w4_bundle)
    lower(path, "ort-cuda", dtype="float32")
    report = verify(path, target="ort-cuda", **FEW)
    assert report.passed
    assert report.settings["target"] == "ort-cuda"
    forms = report.placement["serve"]["step"]["forms"]
    assert sum(count for form, count in forms.items() if form.startswith("MatMulNBits")) == 8 + 2

    content = bytearray((path / CHANGED).read_bytes())
    content[len(content) // 2] ^= 0x11  # one byte of the joined modulation: two codes
    content[len(content) // 2 + 1 : len(content) // 2 + 64] = bytes(63)
    rewrite_listed(path, CHANGED, content)
    assert not verify(path, target="ort-cuda", **FEW).passed
    assert verify(path, **FEW).passed  # the portable graphs do not read it


def test_float16_has_limits_of_its_own(w4_bundle, copied):
    path = copied(w4_bundle)
    lower(path, "ort-cuda")
    report = verify(path, target="ort-cuda", **FEW)
    assert report.skipped == []
    assert report.passed, [check for check in report.checks if not check.passed]
    checks = {check.name: check for check in report.checks}
    kl, logits = checks["KL(torch‖ONNX Runtime)"], checks["step logits: relative L2"]
    assert 1e-7 < kl.value < kl.limit == limits.FP16_KL_FLOOR  # it rounds, or it would not be float16
    assert 1e-4 < logits.value < logits.limit == limits.FP16_RELATIVE_L2

    reorder(path, "weights.data", path / "step.onnx", "blocks.1.ffn.fc1.weight")
    failed = {check.name for check in verify(path, target="ort-cuda", **FEW).checks if not check.passed}
    assert {"KL(torch‖ONNX Runtime)", "step logits: relative L2"} <= failed


@pytest.mark.parametrize("rounded", [False, True])
def test_limits_of_float16_hold_a_denoiser(dit_bundle, copied, rounded, tmp_path):
    path = copied(dit_bundle) if not rounded else _with_quantised_inputs(tmp_path)
    lower(path, "ort-cuda")
    report = verify(path, target="ort-cuda", schedule="ddim-10", **FEW)
    assert report.passed, [check for check in report.checks if not check.passed]
    checks = {check.name: check for check in report.checks}
    output = checks["denoise output: relative L2"]
    assert 1e-4 < output.value < output.limit
    assert rounded == (output.limit > limits.FP16_RELATIVE_L2)


def _with_quantised_inputs(folder):
    request = Request(preset(8, 8), samples=1)
    return quantize("dit-c10-d2", request=request, out=folder / "w8a8").path


def reorder(path, file, graph, weight):
    """Swap the two halves of every byte of a weight, as a wrong order of codes would."""
    model = onnx.load(str(graph), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(place["offset"]), int(place["length"])
    content = bytearray((path / file).read_bytes())
    content[start : start + length] = bytes((byte >> 4 | byte << 4) & 0xFF for byte in content[start : start + length])
    rewrite_listed(path, file, content)


def rewrite_listed(path, file, content):
    """Replace a file, and its hash in the manifest."""
    (path / file).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"][file]["sha256"] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))


def test_a_target_that_is_not_there(w4_bundle):
    with pytest.raises(InputError, match="not lowered to 'ort-cuda'"):
        verify(w4_bundle.path, target="ort-cuda", **FEW)
