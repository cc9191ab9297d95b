"""What the tests of the command line share: ways to run it, and bundles to run it on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "qexport"))  # the hand-made bundle lies there

MODEL = "var-c10-d2"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """Run a command line in this process, which says no lines of progress, however slow the machine is."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("qexport_cli.progress.LINE_SECONDS", math.inf)

    def invoke(*arguments: object) -> Outcome:
        from qexport_cli.main import dispatch

        capsys.readouterr()
        code = dispatch([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return invoke


def command(*arguments: object, before: str = "") -> list[str]:
    """A command line for a process of its own; `before` is Python that runs first."""
    code = f"{before}\nfrom qexport_cli.main import main\nmain()"
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.fixture
def spawn() -> Run:
    """Run a command line in a process of its own."""

    def invoke(*arguments: object, before: str = "", cwd: Path | None = None, **environment: str) -> Outcome:
        done = subprocess.run(
            command(*arguments, before=before),
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return invoke


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The bundle that can be worked out by hand."""
    import toy_bundle

    path = tmp_path_factory.mktemp("toy") / "bundle"
    toy_bundle.write(path)
    return path


@pytest.fixture(scope="session")
def var(tmp_path_factory) -> Path:
    """A real one: var-c10-d2 with int4 weights."""
    from qexport.pipeline import quantize

    path = tmp_path_factory.mktemp("var") / "bundle"
    quantize(MODEL, out=path)
    return path


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system with the given options; skips where that is not allowed."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount-{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)
