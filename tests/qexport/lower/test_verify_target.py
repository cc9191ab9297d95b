"""`verify --target`: the ladder climbs the lowered graphs, and falls where one of their weights is wrong."""

from __future__ import annotations

import hashlib
import json

import pytest

from qexport.bundle.manifest import digest_of
from qexport.errors import InputError
from qexport.lower import lower
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
    (path / CHANGED).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"][CHANGED]["sha256"] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    assert not verify(path, target="ort-cuda", **FEW).passed
    assert verify(path, **FEW).passed  # the portable graphs do not read it


def test_float16_says_what_it_does_not_prove(w4_bundle, copied):
    path = copied(w4_bundle)
    lower(path, "ort-cuda")
    report = verify(path, target="ort-cuda", **FEW)
    assert [skipped.name for skipped in report.skipped] == ["trajectories"]
    assert "float16" in report.skipped[0].reason


def test_a_target_that_is_not_there(w4_bundle):
    with pytest.raises(InputError, match="not lowered to 'ort-cuda'"):
        verify(w4_bundle.path, target="ort-cuda", **FEW)
