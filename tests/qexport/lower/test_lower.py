"""Lowering whole bundles: the numbers stay, bytes are shared and counted, and nothing is ever half written."""

from __future__ import annotations

import json
import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from forced import distances, recorded
from lowering import LIMIT

import qexport.lower.lowering as lower_module
import qexport.runtime as runtime
from qexport.bundle import Bundle
from qexport.errors import BundleError, InputError, UnsupportedError
from qexport.lower import TARGETS, lower

HALF_LIMIT = 1e-3
"""Relative L2 in float16: two units in the last place of 2⁻¹¹, the largest error that one rounding makes."""

BUNDLES = ("w4_bundle", "dit_bundle")
LABELS = [1, 8]
BEHIND_A_DRAW = ("next_f_hat", "next_map")
"""Outputs that jump where a token falls on the other side of a boundary."""


def external(file) -> dict[str, tuple[str, int]]:
    """Location and length of every tensor outside the graph."""
    model = onnx.load(file, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = (entries["location"], int(entries["length"]))
    return found


@pytest.mark.parametrize("name", [*BUNDLES, "llamagen_bundle"])
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_every_output_of_every_call_is_what_it_was(request, copied, name, target):
    path = copied(request.getfixturevalue(name))
    calls = recorded(path, LABELS)
    lower(path, target, dtype="float32")
    worst = max(max(found.values()) for found in distances(path, target, calls))
    assert 0 < worst <= LIMIT  # not 0: the graphs do differ


@pytest.mark.parametrize("name", BUNDLES)
def test_float16_stays_close(request, copied, name):
    path = copied(request.getfixturevalue(name))
    calls = recorded(path, LABELS)
    report = lower(path, "ort-cuda")
    assert report.dtype == "float16"
    found = distances(path, "ort-cuda", calls)
    worst = max(value for call in found for name, value in call.items() if name not in BEHIND_A_DRAW)
    assert LIMIT < worst <= HALF_LIMIT


def test_images_through_the_player(w4_bundle, copied):
    path = copied(w4_bundle)
    want = runtime.load(path, provider="cpu", options="exact", threads=1).generate(LABELS, seed=3)
    lower(path, "ort-cuda", dtype="float32")
    got = runtime.load(path, provider="cpu", options="exact", threads=1, target="ort-cuda").generate(LABELS, seed=3)
    np.testing.assert_allclose(got, want, atol=1e-4)  # DESIGN.md: images on identical tokens


def test_caches_are_float16_ports(w4_bundle, copied):
    path = copied(w4_bundle)
    lower(path, "ort-cuda")
    loaded = runtime.load(path, provider="cpu", threads=1, target="ort-cuda")
    ports = loaded.player.backend.inputs("step")
    assert {ports[name].dtype for name in ports if name.startswith("past_")} == {"float16"}
    assert ports["f_hat"].dtype == "float32"
    assert loaded.generate([1], seed=0).shape == (1, 3, 32, 32)


def test_float16_caches_are_written_in_place(llamagen_bundle, copied):
    path = copied(llamagen_bundle)
    lower(path, "ort-cuda")
    loaded = runtime.load(path, provider="cpu", options="exact", threads=1, target="ort-cuda")
    ports = loaded.player.backend.inputs("token")
    assert {ports[name].dtype for name in ports if name.startswith("past_")} == {"float16"}
    in_place = loaded.generate(LABELS, seed=0)
    player = loaded.player
    copying = player.play({"label": np.array(LABELS)}, seed=0, observer=lambda record: None)
    np.testing.assert_array_equal(in_place, copying)


def test_a_wrong_weight_would_be_seen(dit_bundle, copied):
    path = copied(dit_bundle)
    calls = recorded(path, LABELS)
    lower(path, "ort-cuda", dtype="float32")
    data = path / "targets/ort-cuda/weights.data"
    content = bytearray(data.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    data.write_bytes(content)
    with pytest.raises(BundleError, match="altered"):
        distances(path, "ort-cuda", calls)


@pytest.mark.parametrize("name", BUNDLES)
def test_bytes_are_shared_and_counted(request, copied, name):
    path = copied(request.getfixturevalue(name))
    before = Bundle.open(path)
    report = lower(path, "ort-cuda")
    after = Bundle.open(path, "full")
    graph = next(iter(report.graphs))
    folder = path / "targets/ort-cuda"
    assert report.added_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert report.added_bytes == after.size_bytes - before.size_bytes
    assert json.loads((path / "reports/lower-ort-cuda.json").read_text())["added_bytes"] == report.added_bytes

    portable, lowered = external(path / f"{graph}.onnx"), external(folder / f"{graph}.onnx")
    assert {location for location, _ in lowered.values()} == {"weights.data", "targets/ort-cuda/weights.data"}
    shared = [name for name, (location, _) in lowered.items() if location == "weights.data"]
    assert all(lowered[name] == portable[name.removesuffix(".11N")] for name in shared)
    # What was joined is the modulation of the blocks; everything else that is large is shared, but for the places in a
    # row of logits, which `constant_topk` compares with the count.
    changed = {name: length for name, (location, length) in lowered.items() if location != "weights.data"}
    places = changed.pop("lower.places.4096", 0)
    assert places == (8 * 4096 if name == "w4_bundle" else 0)
    modulation = sum(length for name, (_, length) in portable.items() if "blocks." in name and ".ada" in name.lower())
    assert sum(changed.values()) <= 1.1 * modulation


def test_the_rest_of_the_bundle_is_what_it_was(w4_bundle, copied):
    path = copied(w4_bundle)
    before = Bundle.open(path)
    lower(path, "ort-cpu")
    lower(path, "ort-cuda")
    after = Bundle.open(path, "full")
    assert {name: after.manifest.files[name] for name in before.manifest.files} == before.manifest.files
    assert set(after.manifest.targets) == {"ort-cpu", "ort-cuda"}
    assert after.manifest.digest != before.manifest.digest
    assert all((path / name).stat().st_nlink == 1 for name in after.manifest.files)


def test_the_same_bytes_again(w4_bundle, copied):
    path = copied(w4_bundle)
    lower(path, "ort-cuda")
    first = Bundle.open(path).manifest.digest
    lower(path, "ort-cuda", dtype="float32")
    assert Bundle.open(path).manifest.digest != first
    lower(path, "ort-cuda")
    assert Bundle.open(path).manifest.digest == first


def test_a_failure_leaves_the_bundle_as_it_was(w4_bundle, copied, monkeypatch):
    path = copied(w4_bundle)
    before = sorted(p.name for p in path.parent.iterdir()), Bundle.open(path).manifest.digest

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lower_module, "check_graph", fail)
    with pytest.raises(InputError, match="no space left"):
        lower(path, "ort-cuda")
    assert (sorted(p.name for p in path.parent.iterdir()), Bundle.open(path, "full").manifest.digest) == before


def test_a_graph_without_anything_to_rewrite_has_no_file(dit_bundle, copied):
    path = copied(dit_bundle)
    report = lower(path, "ort-cpu")
    assert report.files == ("targets/ort-cpu/denoise.onnx", "targets/ort-cpu/weights.data")
    files = Bundle.open(path).graph_files("ort-cpu")
    assert files["decode"] == path / "decode.onnx"


def test_reports_come_along(w4_bundle, copied):
    path = copied(w4_bundle)
    (path / "reports").mkdir()
    (path / "reports/verify.json").write_text("{}")
    lower(path, "ort-cpu")
    assert (path / "reports/verify.json").read_text() == "{}"


def test_hard_links_are_refused_in_words(w4_bundle, copied, tmp_path):
    path = copied(w4_bundle)
    os.link(path / "weights.data", tmp_path / "second")
    with pytest.raises(BundleError, match="hard links"):
        lower(path, "ort-cuda")


def test_names_and_types(w4_bundle, copied):
    path = copied(w4_bundle)
    with pytest.raises(UnsupportedError, match="did you mean 'ort-cuda'"):
        lower(path, "ort-cdua")
    with pytest.raises(UnsupportedError, match="float32, not in float16"):
        lower(path, "ort-cpu", dtype="float16")


def row(**changes):
    base = {"name": "layer", "algorithm": "rtn", "format": "int4", "group_size": 128}
    return base | changes


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (row(group_size=32), "--group-size 128"),
        (row(group_size=None), "--group-size 128"),
        (row(format="int2"), "in int2"),
        (row(format="fp8-e5m2", group_size=None), "e4m3"),
        (row(format="int8", group_size=64), "one scale per channel"),
        (row(format="int8", group_size=None, activation_format="int8", activation_scales="per token"), "per token"),
    ],
)
def test_what_tensorrt_does_not_take(w4_bundle, layer, reason):
    manifest = w4_bundle.manifest
    found = TARGETS["tensorrt"].obstacle(type(manifest)(**{**vars(manifest), "layers": [layer]}))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    "layer",
    [row(), row(group_size=64), row(format="int8", group_size=None), row(format="fp8-e4m3", group_size=None),
     row(format="int2", algorithm=None)],
)  # fmt: skip
def test_what_tensorrt_takes(w4_bundle, layer):
    manifest = w4_bundle.manifest
    assert TARGETS["tensorrt"].obstacle(type(manifest)(**{**vars(manifest), "layers": [layer]})) is None


def test_groups_of_32_are_quantised_for_not_lowered_to(w4_bundle, copied):
    with pytest.raises(UnsupportedError, match=r"groups of 32.*quantise"):
        lower(copied(w4_bundle), "tensorrt")


def test_standard_operators_only_for_tensorrt(dit_bundle, copied, monkeypatch):
    path = copied(dit_bundle)
    monkeypatch.setattr("qexport.lower.targets.TENSORRT_BLOCKS", (32,))
    calls = recorded(path, LABELS)
    lower(path, "tensorrt")
    model = ir.load(path / "targets/tensorrt/denoise.onnx")
    assert {node.domain for node in model.graph} == {""}
    assert max(max(found.values()) for found in distances(path, "tensorrt", calls)) <= LIMIT
