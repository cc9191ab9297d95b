"""Its place here puts `tests/` on the import path, for `recipe_weights` and the other helpers."""

from __future__ import annotations

import importlib
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qexport.bundle import Bundle

PLUGIN = Path(__file__).parent / "plugin"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test fetches nothing


@pytest.fixture(scope="session")
def w4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """var-c10-d2 at 4 bits, made once for the whole run (capture takes ten seconds); not to be written to."""
    from qexport.pipeline import quantize
    from qexport.scheme import preset

    return quantize("var-c10-d2", scheme=preset(4), out=tmp_path_factory.mktemp("shared") / "var-c10-d2-w4a16")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: more only cost at the size of tests, and much where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What `pip install tests/plugin` would leave on the path, without pip: the package and its entry points."""
    from qexport.family import ENTRY_POINT_GROUP

    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / f"qexport_ink-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"][ENTRY_POINT_GROUP]
    lines = [f"[{ENTRY_POINT_GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for path in (info.parent, PLUGIN):
        monkeypatch.syspath_prepend(str(path))
    yield importlib.import_module("qexport_ink")
    sys.modules.pop("qexport_ink")


@pytest.fixture
def ink_file(installed, tmp_path) -> Path:
    """Ink, trained by nobody, as its trainer would save it."""
    import torch

    torch.manual_seed(0)
    path = tmp_path / "trained.pt"
    torch.save({"ema": installed.Ink().state_dict()}, path)
    return path
