"""`qexport models`: which files are missing, and which are not because they come with the package."""

from __future__ import annotations

import json
from typing import Any

import pytest
from qexport_cli.main import app
from typer.testing import CliRunner


def rows(monkeypatch: pytest.MonkeyPatch, folder: object) -> dict[str, dict[str, Any]]:
    monkeypatch.setenv("QEXPORT_CHECKPOINTS", str(folder))
    result = CliRunner().invoke(app, ["models", "--json"])
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)["models"]}


def test_a_bundled_decoder_is_not_missing(monkeypatch, tmp_path):
    found = rows(monkeypatch, tmp_path)
    for name in ("var-c10-d5", "dit-c10-d5"):
        assert found[name]["missing"] == [f"{name}.safetensors"]
        assert len(found[name]["files"]) == 2
    assert found["var-c10-d4"]["missing"] == []
    assert found["var-d16"]["missing"] == ["var_d16.pth", "vae_ch160v4096z32.pth"]  # what is not bundled still is


def test_what_lies_in_the_folder_is_here(monkeypatch, tmp_path):
    (tmp_path / "var-c10-d5.safetensors").touch()
    assert rows(monkeypatch, tmp_path)["var-c10-d5"]["missing"] == []
