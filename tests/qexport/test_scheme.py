import pytest

from qexport.errors import InputError
from qexport.formats import get_format
from qexport.scheme import (
    ActivationSpec,
    PerChannel,
    PerGroup,
    PerStep,
    PerTensor,
    PerToken,
    Scheme,
    Static,
    TensorSpec,
    preset,
)


@pytest.mark.parametrize(
    ("wbits", "weight", "name"),
    [
        (16, None, "w16a16"),
        (8, TensorSpec(get_format("int8"), PerChannel()), "w8a16"),
        (4, TensorSpec(get_format("int4"), PerGroup(32)), "w4a16"),
        (3, TensorSpec(get_format("int3"), PerGroup(32)), "w3a16"),
        (2, TensorSpec(get_format("int2"), PerGroup(32)), "w2a16"),
    ],
)
def test_presets(wbits, weight, name):
    scheme = preset(wbits)
    assert scheme == Scheme(weight, None)
    assert scheme.name == name


def test_default_preset_is_w4a16():
    assert preset() == preset(wbits=4, abits=16, group_size=32)


@pytest.mark.parametrize(
    ("wbits", "group_size", "name"),
    [(4, 128, "w4a16-g128"), (4, 32, "w4a16"), (8, 32, "w8a16-g32"), (2, 64, "w2a16-g64")],
)
def test_name_states_an_unusual_group_size(wbits, group_size, name):
    assert preset(wbits, group_size=group_size).name == name


@pytest.mark.parametrize(
    ("granularity", "name"), [(PerTensor(), "w4a16-tensor"), (PerChannel(), "w4a16-channel"), (PerGroup(32), "w4a16")]
)
def test_names_tell_granularities_apart(granularity, name):
    assert Scheme(TensorSpec(get_format("int4"), granularity), None).name == name


@pytest.mark.parametrize("wbits", [0, 1, 5, 7, 9, 32, -4])
def test_widths_without_a_format_are_refused(wbits):
    with pytest.raises(InputError, match="choose one of 2, 3, 4, 6, 8, 16"):
        preset(wbits)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"wbits": 8, "abits": 8}, "w8a8"),
        ({"wbits": 4, "abits": 8}, "w4a8"),
        ({"wbits": 8, "abits": 8, "activation_scales": "step"}, "w8a8-step"),
        ({"wbits": 8, "abits": 8, "activation_scales": "token"}, "w8a8-token"),
        ({"wbits": 8, "abits": 8, "number_format": "fp8"}, "w8a8-fp8"),
    ],
)
def test_activations(arguments, name):
    scheme = preset(**arguments)
    assert scheme.activation is not None
    assert scheme.activation.format.kind == ("float" if "fp8" in name else "int")
    assert scheme.name == name


@pytest.mark.parametrize("abits", [0, 2, 3, 6, 12, 32])
def test_activation_widths_without_a_format_are_refused(abits):
    with pytest.raises(InputError, match=f"--abits {abits} is not available with --format int; choose one of 4, 8, 16"):
        preset(4, abits)


def test_activations_need_quantised_weights():
    with pytest.raises(InputError, match="--abits 8 needs quantised weights"):
        preset(16, 8)


def test_a_zero_point_needs_static_integers():
    with pytest.raises(InputError, match="no zero point"):
        ActivationSpec(get_format("int8"), PerToken(), symmetric=False)
    with pytest.raises(InputError, match="no zero point"):
        ActivationSpec(get_format("fp8-e4m3"), Static(), symmetric=False)


def test_outputs_are_rounded_behind_static_int8_inputs_only():
    spec = ActivationSpec(get_format("int8"), symmetric=False, observer="minmax", outputs=True)
    assert spec.of_output == ActivationSpec(get_format("int8"), observer="minmax")
    for format_name, scales in (("int4", Static()), ("int8", PerStep()), ("fp8-e4m3", Static())):
        with pytest.raises(InputError, match=f"behind {format_name} .* inputs; make those int8 static"):
            ActivationSpec(get_format(format_name), scales, outputs=True)


def test_groups_of_floating_point_are_a_contradiction():
    with pytest.raises(InputError, match="has no meaning with --wbits 16"):
        preset(16, group_size=32)


@pytest.mark.parametrize("size", [0, 1, -32, True, 32.0, "32"])
def test_impossible_group_sizes(size):
    with pytest.raises(InputError, match="group size"):
        PerGroup(size)


def test_scale_shapes():
    assert PerTensor().scale_shape(6, 64) == (1, 1)
    assert PerChannel().scale_shape(6, 64) == (6, 1)
    assert PerGroup(32).scale_shape(6, 64) == (6, 2)


def test_group_size_that_does_not_divide_lists_those_that_do():
    with pytest.raises(InputError, match=r"groups of 32 do not divide an input width of 48; 8, 12, 16, 24, 48 would"):
        PerGroup(32).scale_shape(4, 48)
    with pytest.raises(InputError, match="no size would"):
        PerGroup(32).scale_shape(4, 1)
    with pytest.raises(InputError, match=r"width of 6; 2, 3, 6 would"):
        PerGroup(32).scale_shape(4, 6)
