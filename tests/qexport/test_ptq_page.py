"""docs/ptq.md: the recipe printed there is carried out as it stands, and its table has every key there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qexport import recipe_toml as toml
from qexport.algorithms import ALGORITHMS, SMOOTHERS
from qexport.pipeline import quantize
from qexport.recipe_toml import read_recipe
from qexport.scheme import ACTIVATION_SCALES, OBSERVERS

PAGE = Path(__file__).parents[2] / "docs" / "ptq.md"


def described() -> dict[str, str]:
    """Key → its row, of the table of keys."""
    rows = re.findall(r"^\| `(\w+)` \| (?:top|`\[calibration\]`|rule) \|.*$", PAGE.read_text(), flags=re.MULTILINE)
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| `\w+` \| (top|`\[cal|rule)", line)]
    return dict(zip(rows, lines, strict=True))


def test_every_key_of_a_recipe_is_described():
    known = {
        *toml._RECIPE_KEYS,
        *toml._CALIBRATION_KEYS,
        *toml._QUANTISE_KEYS,
        *toml._KEEP_KEYS,
    }
    assert set(described()) == known


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("algorithm", ALGORITHMS),
        ("smooth", SMOOTHERS),
        ("observer", OBSERVERS),
        ("activation_scales", ACTIVATION_SCALES),
        ("granularity", toml._GRANULARITIES),
    ],
)
def test_every_value_is_named(key, values):
    assert set(values) <= set(re.findall(r'`"([\w-]+)"`', described()[key]))


def test_the_printed_recipe_does_what_the_page_says(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    file = tmp_path / "example.toml"
    file.write_text(text)
    example = read_recipe(file)
    bundle = quantize("var-c10-d2", recipe=example, out=tmp_path / "bundle")
    assert read_recipe(bundle.path / "recipe.toml") == example
    rows = {row["name"]: row for row in bundle.manifest.layers}

    def facts(layer: str, *keys: str) -> tuple:
        return tuple(rows[layer].get(key) for key in keys)

    assert facts("blocks.0.attn.proj", "format", "algorithm") == ("float16", None)
    fc2 = facts("blocks.1.ffn.fc2", "format", "algorithm", "activation_format", "activation_scales", "smooth")
    assert fc2 == ("int8", "gptq", "int8", "static", None)
    qkv = facts("blocks.1.attn.mat_qkv", "format", "algorithm", "activation_scales", "smooth")
    assert qkv == ("int8", "rtn", "per step", "smoothquant")
    assert facts("blocks.1.attn.proj", "format", "group_size", "activation_format") == ("int4", 64, None)
    decoder = [row for row in rows.values() if row["graph"] == "decode" and row["algorithm"]]
    assert decoder
    assert {row["format"] for row in decoder} == {"int8"}
