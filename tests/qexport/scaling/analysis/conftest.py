"""The models that errors are analysed on."""

from __future__ import annotations

import pytest

from qexport.family import Generator
from qexport.pipeline import load_generator


@pytest.fixture(scope="module")
def var() -> Generator:
    return load_generator("var-c10-d2")


@pytest.fixture(scope="module")
def dit() -> Generator:
    return load_generator("dit-c10-d2")
