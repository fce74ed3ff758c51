"""Weights as codes: what GGUF's blocks hold, and what a weight's numbers are quantised to."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.engine.codes import GROUP, codes, codes_or_nearest, exact, is_quantised, quantised

KINDS = {Kind.Q4_0: 1, Kind.Q4_1: 2, Kind.Q4_K: 2, Kind.Q5_0: 1, Kind.Q8_0: 1}  # and how many float16 lead its block
ROWS, COLUMNS = 80, 512


def blocks(kind, seed=0):
    """Any bytes are codes; the scales must be numbers of a weight's size."""
    random = np.random.default_rng(seed)
    width, size = GGML_QUANT_SIZES[kind]
    found = random.integers(0, 256, (ROWS * COLUMNS // width, size), np.uint8)
    scales = random.uniform(-0.1, 0.1, (len(found), KINDS[kind])).astype(np.float16)
    found[:, : 2 * KINDS[kind]] = scales.view(np.uint8)
    return found.reshape(ROWS, -1)


def numbers(found):
    return (found.scale[..., None].astype(float) * found.values + found.base[..., None]).reshape(len(found.values), -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_are_what_gguf_dequantises(kind):
    rows = blocks(kind)
    found = codes(kind, rows)
    assert exact(kind)
    assert found.values.dtype == np.int8
    assert found.bits == 8 or (found.values.min() >= -8 and found.values.max() <= 7)
    np.testing.assert_allclose(numbers(found), dequantize(rows, kind), atol=1e-5)


def test_other_blocks_are_rounded_to_eight_bits():
    weight = np.random.default_rng(0).normal(0, 0.1, (16, 512)).astype(np.float32)
    rows = quantize(weight, Kind.Q5_1)
    assert not exact(Kind.Q5_1)
    found, stored = codes_or_nearest(Kind.Q5_1, rows), dequantize(rows, Kind.Q5_1)
    assert found.bits == 8
    largest = np.abs(stored).reshape(16, -1, GROUP).max(-1).repeat(GROUP, 1)
    assert (np.abs(numbers(found) - stored) <= largest / 254 * 1.001).all()
    assert is_quantised(Kind.Q6_K)
    assert not is_quantised(Kind.F16)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.floats(1e-8, 1e8))
def test_a_quantised_weight_is_off_by_half_a_step(bits, rows, groups, seed, size):
    weight = np.random.default_rng(seed).normal(0, size, (rows, groups * GROUP)).astype(np.float32)
    found = quantised(weight, bits)
    assert found.bits == bits
    assert found.values.min() >= -(2 ** (bits - 1))
    assert found.values.max() < 2 ** (bits - 1)
    step = found.scale.repeat(GROUP, 1)
    assert (np.abs(numbers(found) - weight) <= step * 0.501).all()
    each = weight.reshape(rows, groups, GROUP)
    span = 2 * np.abs(each).max(-1) / 254 if bits == 8 else (each.max(-1) - each.min(-1)) / 15
    np.testing.assert_allclose(found.scale, span, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_all_the_same(bits):
    for value in (0.0, 0.25, -3.0):
        np.testing.assert_allclose(numbers(quantised(np.full((2, 64), value, np.float32), bits)), value, rtol=1e-6)
