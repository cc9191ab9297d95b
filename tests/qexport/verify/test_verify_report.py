"""What a report holds, as JSON and as HTML, and what is skipped without a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qexport.errors import InputError
from qexport.family import Generator
from qexport.verify import verify

FIELDS = ("passed", "checks", "quality", "bits_per_weight", "size_bytes", "placement", "latency_ms", "environment")


@pytest.fixture(scope="module")
def reported(sound_bundle: Path, generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(sound_bundle, tmp_path_factory.mktemp("reported") / "copy"))
    report = verify(
        root, generator=generator, provider="cpu", samples=4, batch=4, quality=True, fd_images=8, max_kl=1.0
    )
    assert report.passed
    return root


def test_json_holds_what_was_promised(reported: Path) -> None:
    data = json.loads((reported / "reports" / "verify.json").read_text())
    assert set(FIELDS) <= set(data)
    for check in data["checks"]:
        assert {"name", "value", "limit", "passed", "where"} <= set(check)
    quality = data["quality"]
    assert quality["n"] == 4
    assert quality["seed"] == 0
    assert 0.02 < quality["kl"] < 0.06
    assert 0.5 < quality["top1_agreement"] < 0.9
    assert len(quality["per_scale"]["kl"]) == 7
    assert quality["fd"]["name"] == "FeatureNet, CIFAR-10"
    assert quality["fd"]["ci95"][0] <= quality["fd"]["value"] <= quality["fd"]["ci95"][1]
    assert data["bits_per_weight"] == 4.5
    assert {"total", "step", "decode"} == set(data["latency_ms"]["batch_1"])
    assert data["trajectories"]["draws"]["total"] == 4 * 155


def test_every_quantised_layer_is_fused(reported: Path) -> None:
    placement = json.loads((reported / "reports" / "verify.json").read_text())["placement"]
    assert placement["cuda"] == "not measured on CUDA"
    assert placement["exact"]["step"]["forms"] == {"MatMulNBits (4 bit, block 32, float activations)": 10}
    assert placement["serve"]["step"]["forms"] == {"MatMulNBits (4 bit, block 32, int8 activations)": 10}


class Page(HTMLParser):
    """Collects what a page refers to, and checks that tags are closed."""

    void = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_whole_and_needs_nothing_else(reported: Path) -> None:
    html = (reported / "reports" / "verify.html").read_text()
    page = Page()
    page.feed(html)
    assert not page.open
    assert all(link.startswith("data:") for link in page.links)
    assert sum(link.startswith("data:image/png") for link in page.links) == 4 * 4
    assert html.count("<svg") == 4
    assert "FD (FeatureNet, CIFAR-10)" in page.text
    assert "FID" not in page.text


def test_reports_leave_nothing_behind_and_do_not_break_the_bundle(reported: Path) -> None:
    assert sorted(p.name for p in (reported / "reports").iterdir()) == ["verify.html", "verify.json"]
    from qexport.bundle import Bundle

    Bundle.open(reported, "full")


def test_other_checkpoint_skips_what_needs_it(
    bundle_copy: Path, generator: Generator, sign_again: Callable[..., None]
) -> None:
    sign_again(bundle_copy, checkpoints={"model": "0" * 64, "vae": "0" * 64})
    report = verify(bundle_copy, generator=generator, provider="cpu", samples=2, speed=False, reports=False)
    assert report.passed
    assert [rung.name for rung in report.skipped] == ["weights, trajectories, quality"]
    assert "is not the one that the bundle was made of" in report.skipped[0].reason
    assert {check.name for check in report.checks} >= {"integrity", "layers not quantised"}
    assert report.placement
    assert "kl" not in report.quality


def test_unknown_model_skips_too(bundle_copy: Path, sign_again: Callable[..., None]) -> None:
    from dataclasses import replace

    from qexport.bundle import Bundle

    model = replace(Bundle.open(bundle_copy, "size").manifest.model, name="nobody-knows")
    sign_again(bundle_copy, model=model)
    report = verify(bundle_copy, provider="cpu", samples=2, speed=False, reports=False)
    assert report.passed
    assert "unknown model" in report.skipped[0].reason


def test_limit_on_kl_can_fail(sound_bundle: Path, generator: Generator) -> None:
    report = verify(
        sound_bundle, generator=generator, provider="cpu", samples=2, batch=2, max_kl=1e-3, speed=False, reports=False
    )
    assert [check.name for check in report.failures] == ["KL(fp‖quantised)"]


def test_no_bundle_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "nothing")
