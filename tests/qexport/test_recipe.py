import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import InputError
from qexport.formats import FORMATS, get_format
from qexport.recipe import Calibration, Recipe, Rule, recipe_for
from qexport.recipe_toml import read_recipe, recipe_text
from qexport.scheme import ActivationSpec, PerChannel, PerGroup, PerTensor, TensorSpec, preset

INT4 = TensorSpec(get_format("int4"), PerGroup(32))
INT8 = TensorSpec(get_format("int8"), PerChannel())
LAYERS = ["blocks.0.attn.qkv", "blocks.0.ffn.fc1", "blocks.1.attn.qkv", "blocks.1.ffn.fc1", "head"]
SHAPES = dict.fromkeys(LAYERS, (8, 64))

printable = st.text(min_size=1, max_size=20).filter(str.isprintable)
specs = st.builds(
    TensorSpec,
    st.sampled_from(list(FORMATS.values())),
    st.one_of(st.just(PerTensor()), st.just(PerChannel()), st.builds(PerGroup, st.integers(2, 2**31))),
)
rules = st.one_of(st.builds(Rule, printable, st.none()), st.builds(Rule, printable, specs, printable))
recipes = st.builds(Recipe, printable, st.lists(rules, max_size=5).map(tuple))


@settings(max_examples=100, deadline=None)
@given(recipes)
def test_a_recipe_survives_its_file(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(recipe_text(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe


def test_toml_says_what_a_reader_of_toml_expects():
    text = recipe_text(Recipe("two", (Rule("head", None), Rule('a"\\b*', INT4), Rule("c", INT8, "gptq"))))
    assert tomllib.loads(text) == {
        "version": 1,
        "name": "two",
        "rules": [
            {"layers": "head", "keep": True},
            {"layers": 'a"\\b*', "format": "int4", "granularity": "group", "group_size": 32, "algorithm": "rtn"},
            {"layers": "c", "format": "int8", "granularity": "channel", "algorithm": "gptq"},
        ],
    }


def test_outputs_are_a_key_that_older_recipes_lack(tmp_path):
    path = tmp_path / "recipe.toml"
    activation = ActivationSpec(get_format("int8"), outputs=True)
    recipe = Recipe("r", (Rule("decode/*", INT8, activation=activation),))
    path.write_text(recipe_text(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe
    assert tomllib.loads(recipe_text(recipe))["rules"][0]["activation_outputs"] is True
    path.write_text(recipe_text(recipe).replace("activation_outputs = true", ""), encoding="utf-8")
    assert read_recipe(path).rules[0].activation == replace(activation, outputs=False)
    plain = Recipe("r", (Rule("decode/*", INT8, activation=replace(activation, outputs=False)),))
    assert "activation_outputs" not in recipe_text(plain)


def test_first_match_wins_and_no_match_keeps_floating_point():
    first, second = Rule("blocks.0.*", INT8), Rule("blocks.*", INT4)
    assigned = Recipe("r", (first, second)).assign(LAYERS, SHAPES)
    assert assigned == {LAYERS[0]: first, LAYERS[1]: first, LAYERS[2]: second, LAYERS[3]: second}
    assert list(assigned) == LAYERS[:4]


def test_a_keeping_rule_shields_layers_from_later_rules():
    assigned = Recipe("r", (Rule("*.attn.*", None), Rule("blocks.*", INT4))).assign(LAYERS, SHAPES)
    assert list(assigned) == ["blocks.0.ffn.fc1", "blocks.1.ffn.fc1"]


def test_patterns_see_the_whole_name_and_its_case():
    assert not Rule("blocks", INT4).matches("blocks.0")
    assert not Rule("Head", INT4).matches("head")
    assert Rule("blocks.?.ffn.fc[12]", INT4).matches("blocks.7.ffn.fc2")


def test_a_rule_without_layers_names_the_nearest():
    recipe = Recipe("r", (Rule("blocks.*", INT4), Rule("haed", None)))
    with pytest.raises(InputError, match=r"rule 2: 'haed' matches none of the 5 layers; did you mean 'head'"):
        recipe.assign(LAYERS, SHAPES)


def test_a_rule_below_a_wider_one_is_reported():
    with pytest.raises(InputError, match=r"rule 2: 'blocks\.0\.\*' never decides.*move it up"):
        Recipe("r", (Rule("blocks.*", INT4), Rule("blocks.0.*", INT8))).assign(LAYERS, SHAPES)


def test_a_group_size_that_does_not_divide_names_layer_width_and_sizes():
    shapes = {**SHAPES, "head": (10, 48)}
    with pytest.raises(InputError, match=r"rule 1, layer 'head': groups of 32 .* width of 48; 8, 12, 16, 24, 48 would"):
        Recipe("r", (Rule("*", INT4),)).assign(LAYERS, shapes)
    assert Recipe("r", (Rule("head", None), Rule("*", INT4))).assign(LAYERS, shapes)


def test_preset_recipes():
    recipe = recipe_for(preset(4), ("*.attn.*", "*.ffn.*"), "var-w4a16")
    assert recipe == Recipe("var-w4a16", (Rule("*.attn.*", INT4, "rtn"), Rule("*.ffn.*", INT4, "rtn")))
    assert len(recipe.assign(LAYERS, SHAPES)) == 4


def test_floating_point_preset_has_no_rules():
    recipe = recipe_for(preset(16), ("*",), "fp")
    assert recipe.rules == ()
    assert recipe.assign(LAYERS, SHAPES) == {}


@pytest.mark.parametrize("scales", ["static", "step", "token"])
def test_a_recipe_with_activations_smoothing_and_calibration_is_read_back(tmp_path, scales):
    scheme = preset(8, 8, activation_scales=scales)
    recipe = recipe_for(scheme, ("blocks.*",), "mine", "gptq", "smoothquant", Calibration(samples=32, seed=7))
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('observer = "mse"', "'observer' has no meaning without 'activation'"),
        ('activation = "int9"', "key 'activation': unknown number format 'int9'"),
        ('activation = "int8"\nactivation_scales = "tokens"', "'tokens', did you mean 'token'|'tokens'"),
        ('activation = "int8"\nactivation_symmetric = 1', "'activation_symmetric' is 1, which is not true or false"),
        ('activation = "int8"\nobserver = "max"', "observer 'max' is unknown"),
    ],
)
def test_wrong_activation_keys(tmp_path, lines, message):
    path = tmp_path / "recipe.toml"
    rule = 'layers = "*"\nformat = "int8"\ngranularity = "channel"'
    path.write_text(f'version = 1\nname = "x"\n[[rules]]\n{rule}\n{lines}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("samples = 0", "at least 1"),
        ("seed = -1", "0 or greater"),
        ("sample = 3", "unknown key 'sample'"),
        ('samples = "3"', "not an integer"),
    ],
)
def test_wrong_calibration(tmp_path, lines, message):
    path = tmp_path / "recipe.toml"
    path.write_text(f'version = 1\nname = "x"\n[calibration]\n{lines}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_recipe(path)


RULE = 'layers = "a"\nformat = "int4"\ngranularity = "group"\ngroup_size = 32\n'
GOOD = f'version = 1\nname = "n"\n[[rules]]\nlayers = "head"\nkeep = true\n[[rules]]\n{RULE}'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 1", "version = 2", "version is 2; this qexport reads version 1"),
        ("version = 1", "version = true", "version is True"),
        ("version = 1", "", "key 'version' is missing"),
        ('name = "n"', "", "key 'name' is missing"),
        ('name = "n"', "name = 3", "key 'name' is 3, which is not a text"),
        ('name = "n"', 'name = ""', "key 'name' is ''"),
        ('name = "n"', 'name = "n"\nnmae = "m"', "unknown key 'nmae'; did you mean 'name'"),
        ("keep = true", "keep = false", "rule 1: key 'keep' is False"),
        ("keep = true", 'keep = true\nformat = "int4"', "rule 1: unknown key 'format' in a rule that keeps"),
        ("group_size = 32", "group_sise = 32", "rule 2: unknown key 'group_sise'; did you mean 'group_size'"),
        ("group_size = 32", "", "rule 2: key 'group_size' is missing"),
        ("group_size = 32", "group_size = true", "rule 2: key 'group_size' is True, which is not an integer"),
        ("group_size = 32", "group_size = 1", "rule 2: key 'group_size': group size 1"),
        ('"group"', '"grup"', "rule 2: key 'granularity' is 'grup'; did you mean 'group'"),
        ('"group"', '"channel"', "rule 2: key 'group_size' has no meaning with granularity 'channel'"),
        ('"int4"', '"int5"', "rule 2: key 'format': unknown number format 'int5'"),
        ('"int4"', "4", "rule 2: key 'format' is 4, which is not a text"),
        ('layers = "a"', 'layers = "a\\nb"', "rule 2: key 'layers' is 'a\\nb'"),
        ("[[rules]]", "[rules]", ""),
        ("keep = true", "keep = ", ""),
    ],
)
def test_bad_files_name_file_rule_and_key(tmp_path, old, new, message):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    text = str(caught.value)
    assert "mine.toml: " in text
    assert message in text
    assert "\n" not in text


def test_the_good_file_is_good(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8")
    assert read_recipe(path) == Recipe("n", (Rule("head", None), Rule("a", INT4)))


def test_rules_that_are_no_tables(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('version = 1\nname = "n"\nrules = "all"\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"start each with \[\[rules\]\]"):
        read_recipe(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe4"')
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "latin.toml")


def test_an_algorithm_without_work_is_refused():
    with pytest.raises(InputError, match="has nothing to do"):
        Rule("head", None, "gptq")
