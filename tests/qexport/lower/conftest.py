"""Bundles that the tests of lowering start from; each test lowers a copy of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qexport.bundle import Bundle

Copy = Callable[[Bundle], Path]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def dit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """dit-c10-d2 at 4 bits."""
    from qexport.pipeline import quantize
    from qexport.scheme import preset

    return quantize("dit-c10-d2", scheme=preset(4), out=tmp_path_factory.mktemp("dit") / "dit-c10-d2-w4a16")


@pytest.fixture(scope="session")
def dit_float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """dit-c10-d2 with weights in fp16."""
    from qexport.pipeline import quantize
    from qexport.scheme import preset

    return quantize("dit-c10-d2", scheme=preset(16), out=tmp_path_factory.mktemp("dit16") / "dit-c10-d2-w16a16")


@pytest.fixture(scope="session")
def llamagen_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny LlamaGen of random weights at 4 bits."""
    from tiny_models import tiny_llamagen

    from qexport.export import export
    from qexport.recipe import recipe_for
    from qexport.scheme import preset

    generator = tiny_llamagen()
    recipe = recipe_for(preset(4), generator.default_layers, "w4a16")
    out = tmp_path_factory.mktemp("llamagen") / "bundle"
    return export(generator, recipe, out, progress=lambda stage, done, total: None)


@pytest.fixture
def copied(tmp_path: Path) -> Copy:
    """A copy of a bundle that a test may write to."""

    def copy(bundle: Bundle) -> Path:
        return Path(shutil.copytree(bundle.path, tmp_path / "bundle"))

    return copy
