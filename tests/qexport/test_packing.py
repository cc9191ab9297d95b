import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qexport.errors import InputError
from qexport.numerics.packing import pack, transposed, unpack

TYPES = {2: onnx.TensorProto.INT2, 4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}
DTYPES = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}


def read_by_onnx(data, bits, shape):
    tensor = onnx.TensorProto(data_type=TYPES[bits], dims=shape, raw_data=data.tobytes())
    return onnx.numpy_helper.to_array(tensor).astype(np.int8)


@st.composite
def packable(draw):
    bits = draw(st.sampled_from([2, 4, 8]))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=7))
    limit = 1 << (bits - 1)
    return bits, draw(hnp.arrays(np.int8, shape, elements=st.integers(-limit, limit - 1)))


def test_int4_by_hand_low_nibble_first():
    assert pack(np.array([1, 2, -1, -8, 7], np.int8), 4).tolist() == [0x21, 0x8F, 0x07]


def test_int2_by_hand_lowest_bits_first():
    # 1, -1, 0, -2 → 01, 11, 00, 10 from the lowest bits up.
    assert pack(np.array([1, -1, 0, -2, 1], np.int8), 2).tolist() == [0b10_00_11_01, 0b01]


def test_int8_is_the_bytes_and_a_copy():
    codes = np.array([-128, -1, 0, 127], np.int8)
    packed = pack(codes, 8)
    assert packed.tolist() == [128, 255, 0, 127]
    packed[:] = 0
    assert codes.tolist() == [-128, -1, 0, 127]


@settings(max_examples=100, deadline=None)
@given(packable())
def test_onnx_reads_back_what_was_packed(case):
    bits, codes = case
    np.testing.assert_array_equal(read_by_onnx(pack(codes, bits), bits, codes.shape), codes)


@settings(max_examples=100, deadline=None)
@given(packable())
def test_onnx_ir_writes_the_same_bytes(case):
    bits, codes = case
    reference = onnx_ir.Tensor(codes.astype(DTYPES[bits]), dtype=onnx_ir.DataType(TYPES[bits])).tobytes()
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == reference


@settings(max_examples=100, deadline=None)
@given(packable())
def test_unpack_reads_what_onnx_ir_wrote(case):
    bits, codes = case
    written = onnx_ir.Tensor(codes.astype(DTYPES[bits]), dtype=onnx_ir.DataType(TYPES[bits])).tobytes()
    back = unpack(np.frombuffer(written, np.uint8), bits, codes.shape)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


def test_every_code_at_every_place_of_a_byte():
    for bits in (2, 4):
        limit = 1 << (bits - 1)
        codes = np.array(np.meshgrid(*[np.arange(-limit, limit)] * (8 // bits))).reshape(-1).astype(np.int8)
        np.testing.assert_array_equal(read_by_onnx(pack(codes, bits), bits, codes.shape), codes)


def test_transposed_codes_are_packed_in_their_logical_order():
    codes = np.arange(-6, 6, dtype=np.int8).reshape(4, 3)
    np.testing.assert_array_equal(read_by_onnx(pack(codes.T, 4), 4, (3, 4)), codes.T)


def test_swapped_nibbles_are_noticed():
    codes = np.array([[1, 2, 3, -4]], np.int8)
    packed = pack(codes, 4)
    swapped = (packed << 4) | (packed >> 4)
    assert not np.array_equal(read_by_onnx(swapped, 4, codes.shape), codes)


def test_packing_leaves_the_codes_alone():
    codes = np.array([-1, -2, 1], np.int8)
    pack(codes, 2)
    assert codes.tolist() == [-1, -2, 1]


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (2, 2), (2, -3)])
def test_codes_that_do_not_fit_are_refused(bits, code):
    with pytest.raises(InputError, match=f"which {bits} bits cannot hold"):
        pack(np.array([0, code], np.int8), bits)


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 16])
def test_widths_that_onnx_does_not_pack(bits):
    with pytest.raises(InputError, match="ONNX packs no"):
        pack(np.zeros(2, np.int8), bits)
    with pytest.raises(InputError, match="ONNX packs no"):
        unpack(np.zeros(2, np.uint8), bits, (2,))


def test_other_dtypes_and_lengths_are_refused():
    with pytest.raises(InputError, match="must be int8"):
        pack(np.zeros(2, np.int32), 4)
    with pytest.raises(InputError, match=r"needs uint8 \(2,\)"):
        unpack(np.zeros(3, np.uint8), 4, (3,))
    with pytest.raises(InputError, match="packed bytes are int8"):
        unpack(np.zeros(2, np.int8), 4, (3,))


def test_nothing_packs_to_nothing():
    assert pack(np.zeros((0, 4), np.int8), 4).shape == (0,)
    assert unpack(np.zeros(0, np.uint8), 2, (0, 4)).shape == (0, 4)


@pytest.mark.parametrize("shape", [(1, 1), (31, 5), (32, 7), (100, 33), (0, 3)])
@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_transposed_is_the_transpose_in_c_order(shape, dtype):
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    turned = transposed(x)
    assert turned.flags.c_contiguous
    assert turned.dtype == dtype
    assert np.array_equal(turned, x.T)
