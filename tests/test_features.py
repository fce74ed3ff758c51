"""Features travel: what is unpacked is what was packed, and what is no such thing is said to be none."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipelines.images.features import Features, pack, unpack

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
ARRAYS = st.dictionaries(
    st.text(max_size=12),
    arrays.arrays(st.sampled_from(DTYPES), arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)),
    max_size=4,
)
IDENTITY = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)
SMALL = Features({"pixel_values": np.ones((1, 3, 2, 2), np.float32), "grid": np.array([[1, 2, 2]])}, [5, -7, -7])


@settings(max_examples=200, deadline=None)
@given(arrays=ARRAYS, identity=IDENTITY)
def test_what_is_unpacked_is_what_was_packed(arrays, identity):
    found = unpack(pack(Features(arrays, identity)))
    assert found.identity == identity
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
        assert found.arrays[name].tobytes() == array.tobytes()


def test_an_array_that_is_a_view_of_another():
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    assert (unpack(pack(Features({"a": array}, []))).arrays["a"] == array).all()


def test_the_other_byte_order():
    array = np.arange(3, dtype=">f4")
    assert unpack(pack(Features({"a": array}, []))).arrays["a"].tolist() == [0, 1, 2]


def test_unpacking_copies_nothing():
    packed = pack(SMALL)
    pixels = unpack(packed).arrays["pixel_values"]
    assert np.shares_memory(pixels, packed)
    assert (pixels.__array_interface__["data"][0] - packed.__array_interface__["data"][0]) % 64 == 0


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([1j]), np.array([object()])])
def test_what_does_not_travel(array):
    with pytest.raises(ValueError, match=r"arrays\.a is of"):
        pack(Features({"a": array}, []))


@pytest.mark.parametrize(
    "packed",
    [
        np.zeros(0, np.uint8),
        np.zeros(100, np.uint8),
        np.full(100, 1, np.uint8),
        np.zeros((2, 50), np.uint8),
        np.zeros(100, np.float32),
        pack(SMALL)[:40],
        pack(SMALL)[:-64],
        pack(SMALL)[::2],
    ],
)
def test_what_is_no_packed_features(packed):
    with pytest.raises(ValueError, match="packed features"):
        unpack(packed)


def header(text, room=64):
    packed = np.zeros(8 + len(text) + room, np.uint8)
    packed[0], packed[4] = 1, len(text)
    packed[8 : 8 + len(text)] = np.frombuffer(text, np.uint8)
    return packed


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"{}",
        b"7",
        b"[]",
        b"\xff",
        b"[[]]",
        b'[["identity", "int64", [1]]]',
        b'[["identity", "float32", [1], 0]]',
        b'[["identity", "int64", [1, 1], 0]]',
        b'[["identity", "object", [1], 0]]',
        b'[["identity", ["int64"], [1], 0]]',
        b'[["identity", "int64", [1000], 0]]',
        b'[["identity", "int64", [1], 1000]]',
        b'[["identity", "int64", [-1], 0]]',
        b'[["identity", "int64", [1], -8]]',
        b'[["identity", "int64", [true], 0]]',
        b'[["identity", "int64", [1.5], 0]]',
        b'[["identity", "int64", 1, 0]]',
        b'[["identity", "int64", [0, 99999999999999999999999], 0]]',
        b'[["identity", "int64", [0, 2147483648, 2147483648, 2147483648], 0]]',
        b'[["identity", "int64", [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1], 0]]',
    ],
)
def test_a_header_that_is_none(text):
    with pytest.raises(ValueError):  # noqa: PT011 (numpy says some of it)
        unpack(header(text))


def test_a_header_that_is_one():
    assert unpack(header(b'[["identity", "int64", [1], 0]]')).identity == [0]


@settings(max_examples=300, deadline=None)
@given(where=st.integers(0, 300), value=st.integers(0, 255))
def test_a_changed_byte_is_an_error_or_another_value(where, value):
    packed = pack(SMALL)
    packed[where % packed.size] = value
    with suppress(ValueError):
        unpack(packed)
