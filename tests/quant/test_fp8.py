"""FP8 activations and weights against exact fractions, and the mistakes that are easy to make."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.quant import fp8
from tests.quant import reference
from tests.quant.samples import as_bytes, compiler_warnings, floats32, halfway, noise, same_bits

E8M0 = torch.float8_e8m0fnu


def check_row(row: torch.Tensor, group: int) -> None:
    """One row through both forms, every bit against the reference."""
    codes, exponents, values = reference.fp8_row(row.float().tolist(), group)
    q, scale = fp8.quantize_activations(row, group)
    assert as_bytes(q) == codes
    assert scale.tolist() == [2.0**e for e in exponents]
    simulated = fp8.simulate(row, group)
    assert simulated.dtype == row.dtype
    assert simulated.tolist() == [float(v) for v in values]
    dequantized = fp8.dequantize_activations(q, scale, group)
    assert same_bits(simulated, dequantized.to(row.dtype))


@pytest.mark.parametrize("exponent", [-22, -3, 0, 40, 118])
def test_rounding_is_to_nearest_with_ties_to_even(exponent: int):
    points = torch.tensor(halfway(reference.E4M3)) * 2.0**exponent
    row = torch.cat((points, -points))
    assert fp8.quantize_activations(row, len(row))[1].tolist() == [2.0**exponent]
    check_row(row, len(row))


def test_rounding_from_bfloat16_input():
    points = torch.tensor(halfway(reference.E4M3)[:253]).bfloat16()  # exact: values, then ties
    check_row(torch.cat((points, -points)), 1000)


@pytest.mark.parametrize("k", range(-13, 120, 7))
def test_the_scale_is_rounded_up_to_a_power_of_two(k: int):
    exact = torch.tensor([448.0 * 2.0**k])
    above = torch.tensor([449.0 * 2.0**k])
    below = torch.tensor([447.0 * 2.0**k])
    assert fp8.quantize_activations(exact)[1].tolist() == [2.0**k]
    assert fp8.quantize_activations(below)[1].tolist() == [2.0**k]
    assert fp8.quantize_activations(above)[1].tolist() == [2.0 ** (k + 1)]
    for x in (exact, above, below):
        check_row(x, 128)


def test_small_groups_share_the_floor():
    for amax in (0.0, 1e-45, 1e-20, 9.9e-5, 1e-4):
        row = torch.tensor([amax, -amax / 3, 0.0])
        assert fp8.quantize_activations(row)[1].tolist() == [2.0**-22]
        check_row(row, 128)
    check_row(torch.tensor([1.2e-4, 2e-5]), 128)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(floats32((-30, 30)), min_size=1, max_size=70),
    st.integers(1, 80),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_any_row_in_any_grouping(row: list[float], group: int, dtype: torch.dtype):
    check_row(torch.tensor(row, dtype=dtype), group)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(floats32((-149, 126)), min_size=1, max_size=12))
def test_rows_over_the_whole_float32_range(row: list[float]):
    check_row(torch.tensor(row), 4)


def test_groups_do_not_leak_into_each_other():
    x = torch.ones(2, 256)
    x[0, 128:] *= 1000
    assert fp8.quantize_activations(x)[1].log2().tolist() == [[-8, 2], [-8, -8]]
    x = torch.ones(192)
    x[64:128] *= 1000
    assert fp8.quantize_activations(x, 64)[1].log2().tolist() == [-8, 2, -8]


def test_unrounded_scales():
    x = noise(5, 200, seed=1)
    # Divided, the second value lies above a tie; times the inverse of the scale, exactly on it.
    x[4, 128:] = 0
    x[4, 128], x[4, 129] = 1.4962565898895264, 0.08349646627902985
    q, scale = fp8.quantize_activations(x, 128, round_scale=False)
    reciprocal = np.float32(1 / 448)
    for row, codes, scales in zip(x.tolist(), as_bytes(q), scale.tolist(), strict=True):
        for i, s in enumerate(scales):
            part = row[128 * i : 128 * i + 128]
            assert s == max(np.float32(abs(v)) for v in part) * reciprocal
            quotients = (np.array(part, np.float32) / np.float32(s)).tolist()
            expected = [
                reference.encode(reference.E4M3, reference.Fraction(v)) | (0x80 if v < 0 else 0)
                for v in quotients
            ]
            assert codes[128 * i : 128 * i + 128] == expected
    assert (scale.log2() % 1 != 0).any()


def test_leading_dimensions_strides_and_empty_batches():
    x = noise(2, 3, 5, 200, seed=2)
    for group in (64, 128, 500):
        rows = torch.stack([fp8.simulate(row, group) for row in x.flatten(0, 2)])
        assert torch.equal(fp8.simulate(x, group), rows.view_as(x))
    turned = noise(200, 6, seed=3).T
    assert torch.equal(fp8.simulate(turned), fp8.simulate(turned.contiguous()))
    q, scale = fp8.quantize_activations(turned)
    assert q.shape == (6, 200)
    assert scale.shape == (6, 2)
    assert fp8.simulate(torch.empty(0, 3, 200)).shape == (0, 3, 200)


def test_the_input_is_left_alone():
    for x in (noise(3, 128), noise(3, 100), noise(3, 128).bfloat16(), -noise(4, 8).abs()):
        before = x.clone()
        fp8.simulate(x)
        fp8.quantize_activations(x)
        fp8.quantize_activations(x, round_scale=False)
        fp8.simulate_weight(x, 4)
        fp8.quantize_weight(x, 4)
        assert same_bits(x, before)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_group_with_a_value_that_is_not_finite_is_nan(bad: float):
    x = torch.ones(3, 256)
    x[1, 200] = bad
    for y in (
        fp8.simulate(x),
        fp8.dequantize_activations(*fp8.quantize_activations(x)),
        fp8.dequantize_activations(*fp8.quantize_activations(x, round_scale=False)),
    ):
        expected = torch.zeros(3, 256, dtype=torch.bool)
        expected[1, 128:] = True
        assert torch.equal(y.isnan(), expected)


def test_the_hot_functions_never_read_values_back():
    x = torch.empty(4, 300, device="meta")  # holds no values: reading one raises
    assert fp8.simulate(x).shape == x.shape
    assert fp8.quantize_activations(x)[1].shape == (4, 3)
    assert fp8.simulate_weight(x).shape == x.shape
    with pytest.raises(RuntimeError):
        x[0, 0].item()


@compiler_warnings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_simulate_compiles_into_one_graph(dtype: torch.dtype):
    x = noise(3, 200, seed=4).to(dtype).requires_grad_()
    compiled = torch.compile(fp8.simulate, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert same_bits(y.detach(), fp8.simulate(x.detach()))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


# Weights


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (5, 7), (3, 9), (1, 1), (12, 4)])
def test_weight_tiles(rows: int, cols: int):
    w = noise(rows, cols, seed=rows, spread=4.0)
    codes, exponents, values = reference.fp8_weight(w.tolist(), 4)
    q, scale = fp8.quantize_weight(w, 4)
    assert as_bytes(q) == codes
    assert scale.dtype == E8M0
    assert as_bytes(scale) == [[e + 127 for e in line] for line in exponents]
    expected = torch.tensor([[float(v) for v in line] for line in values])
    assert torch.equal(fp8.dequantize_weight(q, scale, 4), expected)
    assert torch.equal(fp8.simulate_weight(w, 4), expected)
    assert torch.equal(
        fp8.simulate_weight(w.bfloat16(), 4).float(),
        (fp8.dequantize_weight(*fp8.quantize_weight(w.bfloat16(), 4), 4)),
    )


def test_each_value_uses_the_scale_of_its_own_tile():
    rows, cols = 130, 300
    q = torch.ones(rows, cols).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[100, 101, 102], [110, 111, 112]], dtype=torch.uint8)
    w = fp8.dequantize_weight(q, exponents.view(E8M0))
    for r in range(rows):
        expected = [2.0 ** (int(exponents[r // 128, c // 128]) - 127) for c in range(cols)]
        assert w[r].tolist() == expected
    as_floats = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    w = fp8.dequantize_weight(q, as_floats)
    for r in (0, 127, 128, 129):
        assert w[r, [0, 127, 128, 255, 256, 299]].tolist() == (
            as_floats[r // 128, [0, 0, 1, 1, 2, 2]].tolist()
        )


def test_experts_are_quantised_one_by_one():
    w = noise(2, 3, 9, 10, seed=5, spread=3.0)
    q, scale = fp8.quantize_weight(w, 4)
    assert scale.shape == (2, 3, 3, 3)
    both = fp8.dequantize_weight(q, scale, 4)
    for i in range(2):
        for j in range(3):
            alone = fp8.quantize_weight(w[i, j], 4)
            assert same_bits(q[i, j], alone[0])
            assert same_bits(scale[i, j], alone[1])
            assert torch.equal(both[i, j], fp8.dequantize_weight(*alone, 4))
    assert torch.equal(fp8.simulate_weight(w, 4), both)


def test_float32_weight_scales():
    w = noise(6, 9, seed=6)
    q, scale = fp8.quantize_weight(w, 4, scale_dtype=torch.float32)
    assert scale.dtype == torch.float32
    assert scale[1, 2] == w[4:, 8:].abs().max() * np.float32(1 / 448)
    assert (scale.log2() % 1 != 0).all()
    back = fp8.dequantize_weight(q, scale, 4)
    assert torch.equal(back[4:, 8:], q[4:, 8:].float() * scale[1, 2])
    assert torch.equal(fp8.simulate_weight(w, 4, torch.float32), back)
    # Half a unit in the last place: 2^-4 relative, 2^-10 of the scale among subnormal codes.
    limit = torch.maximum(w.abs() * 2**-4, scale.max() * 2**-10) * 1.00001
    assert ((back - w).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_a_weight_with_float32_scales_come_back(dtype: torch.dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    q = codes.view(torch.float8_e4m3fn).repeat(40, 1)
    generator = torch.Generator().manual_seed(1)
    scale = 2.0 ** (40 * torch.rand(40, 2, generator=generator) - 30)
    scale[0, 0] = 0.0
    w = fp8.dequantize_weight(q.view(40, 1, 256), scale.view(40, 1, 2)).to(dtype)
    found = fp8.weight_codes(w, scale.view(40, 1, 2))[:, 0]
    expected = q.float()
    expected[0, :128] = 0
    assert torch.equal(found, expected)
    w.requires_grad_(True)
    fp8.weight_codes(w, scale.view(40, 1, 2))[1:].sum().backward()
    assert torch.allclose(w.grad[1:, 0, ::128].float(), 1 / scale[1:], rtol=2**-8)


@pytest.mark.parametrize("byte", [1, 20, 127, 240])
def test_writing_a_dequantised_weight_back_loses_nothing(byte: int):
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 1
    codes = torch.stack((codes, codes & 0x83))  # the second row has subnormal codes only
    scale = torch.full((1, 2), byte, dtype=torch.uint8).view(E8M0)
    w = fp8.dequantize_weight(codes.view(torch.float8_e4m3fn), scale)
    for rows in (w, w[1:]):
        assert torch.equal(fp8.dequantize_weight(*fp8.quantize_weight(rows)), rows)
    zero = torch.zeros(3, 3)
    assert torch.equal(fp8.dequantize_weight(*fp8.quantize_weight(zero)), zero)


def test_exponent_bytes_are_never_read_as_numbers():
    q = torch.ones(2, 2).to(torch.float8_e4m3fn)
    byte = torch.tensor([[130]], dtype=torch.uint8)
    assert fp8.dequantize_weight(q, byte.view(E8M0)).tolist() == [[8.0, 8.0], [8.0, 8.0]]
    for number in (byte, byte.to(torch.int32), byte.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="float8_e8m0fnu or float32"):
            fp8.dequantize_weight(q, number)


def test_damaged_scales_are_refused():
    q = torch.ones(130, 2).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\(1, 0\) is NaN"):
        fp8.dequantize_weight(q, torch.tensor([[127], [255]], dtype=torch.uint8).view(E8M0))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"\(1, 0\) is not finite"):
            fp8.dequantize_weight(q, torch.tensor([[1.0], [bad]]))
    activations = torch.ones(1, 2).to(torch.float8_e4m3fn)
    nan = torch.tensor([[255]], dtype=torch.uint8).view(E8M0)
    with pytest.raises(ValueError, match="NaN"):
        fp8.dequantize_activations(activations, nan)


def test_what_does_not_fit_is_refused():
    q = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="do not fit a weight"):
        fp8.dequantize_weight(q, torch.ones(2, 1))
    with pytest.raises(ValueError, match="do not fit codes"):
        fp8.dequantize_activations(q, torch.ones(4, 2))
    with pytest.raises(ValueError, match="must be float8_e4m3fn"):
        fp8.dequantize_weight(torch.ones(4, 4), torch.ones(1, 1))
    with pytest.raises(ValueError, match="must be float8_e4m3fn"):
        fp8.dequantize_activations(torch.ones(4, 4), torch.ones(4, 1))
    with pytest.raises(ValueError, match="weight scales are"):
        fp8.quantize_weight(torch.ones(4, 4), scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="cannot quantise"):
        fp8.simulate(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="nothing to group"):
        fp8.simulate(torch.ones(4, 0))
    with pytest.raises(ValueError, match="nothing to group"):
        fp8.quantize_weight(torch.ones(4))
    with pytest.raises(ValueError, match="at least one"):
        fp8.simulate(torch.ones(4), 0)


def test_e8m0_scales_of_activations_are_accepted():
    x = noise(3, 256, seed=7)
    q, scale = fp8.quantize_activations(x)
    stored = fp8.encode_e8m0(scale)
    assert torch.equal(fp8.dequantize_activations(q, stored), fp8.simulate(x))
