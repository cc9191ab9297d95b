"""One bundle for all tests of verify: var-c10-d2 at 4 bits, and tools to damage copies of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from feature_support import WIDTH

from qexport.bundle import Manifest
from qexport.bundle.manifest import FileEntry
from qexport.family import Generator, find_model
from qexport.pipeline import quantize
from qexport.scheme import preset
from qexport.verify.statistics import Statistics

MODEL = "var-c10-d2"


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that passes; not to be written to."""
    return quantize(MODEL, scheme=preset(4), out=tmp_path_factory.mktemp("verify") / "sound").path


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another model; not to be written to."""
    return quantize("var-c10-d3", scheme=preset(4), out=tmp_path_factory.mktemp("verify") / "other").path


@pytest.fixture(scope="session")
def generator() -> Generator:
    """The full-precision model of `sound_bundle`; not to be changed."""
    family, entry = find_model(MODEL)
    return family.load(entry, None, None)


@pytest.fixture
def bundle_copy(sound_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound_bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def sign_again() -> Callable[[Path], None]:
    """Hash a changed bundle anew: whoever can write files can do that, so verify must not rely on hashes."""

    def sign(root: Path, **changes: object) -> None:
        manifest = Manifest.loads((root / "manifest.json").read_bytes())
        files = {
            name: FileEntry(hashlib.sha256((root / name).read_bytes()).hexdigest(), (root / name).stat().st_size)
            for name in manifest.files
        }
        (root / "manifest.json").write_bytes(replace(manifest, files=files, **changes).dumps())

    return sign


@pytest.fixture(scope="session")
def place_of() -> Callable[[Path, str], tuple[int, int]]:
    """Offset and length in weights.data of an initialiser of the step graph."""

    def place(root: Path, name: str) -> tuple[int, int]:
        graph = onnx.load(str(root / "step.onnx"), load_external_data=False).graph
        tensor = next(t for t in graph.initializer if t.name == name)
        entry = {item.key: item.value for item in tensor.external_data}
        return int(entry["offset"]), int(entry["length"])

    return place


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers for every test."""
    return np.random.default_rng(5)


@pytest.fixture
def real(rng: np.random.Generator) -> Statistics:
    """Statistics of real images."""
    x_ND = rng.standard_normal((40, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH)) + 3
    return Statistics(x_ND.mean(axis=0), np.cov(x_ND, rowvar=False), 40, "real")
