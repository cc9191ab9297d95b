import pytest

from qexport.errors import InputError, UnsupportedError
from qexport.formats import get_format
from qexport.scheme import PerChannel, PerGroup, PerTensor, Scheme, TensorSpec, preset


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


@pytest.mark.parametrize("wbits", [0, 1, 5, 6, 7, 9, 32, -4])
def test_widths_without_a_format_are_refused(wbits):
    with pytest.raises(InputError, match="choose one of 2, 3, 4, 8, 16"):
        preset(wbits)


@pytest.mark.parametrize("abits", [8, 4, 32])
def test_activations_are_refused_by_name(abits):
    with pytest.raises(UnsupportedError, match="activation quantisation is not available yet"):
        preset(4, abits)


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
