"""The kernels against direct computations: sorting, a scalar splitmix64, rational arithmetic, numpy in float64."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lfm.engine.blocks import Blocks, run_solve
from mergekit_lfm.kernels import selection
from mergekit_lfm.kernels.bits import apply_mask, flip_signs, magnitude_bits, mask_above, negative
from mergekit_lfm.kernels.random import Coins, key, words
from mergekit_lfm.kernels.ranks import NONE, Ranks, largest, largest_of_nonzero
from mergekit_lfm.kernels.reductions import L1, ColumnGram, Gram, RowGram, SignBalance
from mergekit_lfm.kernels.series import exp
from mergekit_lfm.kernels.sums import Spread, round_once, weighted_sum
from mergekit_lfm.machine.accelerators import HOST, Accelerator
from mergekit_lfm.methods.method import Unit

select: Any = run_solve  # its type is that of the solve of a method; a selection returns ranks


def blocks_of(x: torch.Tensor, block: int, accelerator: Accelerator = HOST, at_once: int = 1) -> Blocks:
    """The rows of x [n, m] as inputs without a base."""
    readers = [lambda start, stop, row=row: row[start:stop] for row in x]
    return Blocks(readers, None, x.shape[1], block, x.dtype, accelerator=accelerator, at_once=at_once)


def unit_of(x: torch.Tensor) -> Unit:
    return Unit("x", (x.shape[1],), x.shape[1], {}, ({},) * len(x), (0,) * len(x), x.dtype == torch.float64)


def kept_by_sorting(x: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest entries by magnitude, among equals those of lowest index, as a mask."""
    order = np.lexsort((np.arange(x.size), -np.abs(x)))
    mask = np.zeros(x.size, dtype=bool)
    mask[order[: max(0, count)]] = True
    return mask


def kept_by_counting(x: torch.Tensor, counts: list[list[int]], block: int, **way: Any) -> np.ndarray:
    """[n, m] the same by the kernels: the first count's set without the second's. way: as of `largest`."""
    blocks = blocks_of(x, block)
    found = select(largest(x.shape[1], counts, double=x.dtype == torch.float64, **way), blocks.reduce)
    ranks = Ranks([(row[0], row[1]) for row in found])
    parts = []
    for i in range(len(blocks)):
        b = blocks.load(i)
        local = ranks.at(b.start, b.count, b.dtype)
        parts.append(np.stack([local.mask(k, b.row(k)).numpy() != 0 for k in range(len(b))]))
    return np.concatenate(parts, axis=1)


def values_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers with many, few or no equal ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if kind == "bfloat16":
        x = (x * 0.01).bfloat16()
    elif kind == "equal":
        x = torch.full_like(x, -0.25)
    elif kind == "zero":
        x = x * 0
    elif kind == "few":
        x = x.round()
    elif kind == "subnormal":
        x = x * 1e-40
    elif kind == "signs":
        x = x.sign() * torch.arange(1.0, 1.0 + len(x))[:, None]
    return x.to(dtype)


VALUES = ["normal", "bfloat16", "equal", "zero", "few", "subnormal", "signs"]
WAYS: dict[str, dict[str, Any]] = {
    "partition": {},
    "digits": {"few": 0},
    "bracket": {"few": 0, "sampling_pays": 1, "collected": 1 << 20},
    "few collected": {"few": 0, "sampling_pays": 1, "collected": 3},
}


@pytest.mark.parametrize(
    ("values", "block", "dtype", "way"), cases(VALUES, [1, 7, 64, 1000], [torch.float32, torch.float64], list(WAYS))
)
def test_the_largest_are_those_a_stable_sort_finds(values: str, block: int, dtype: torch.dtype, way: str) -> None:
    """In each of the ways in which a rank's value is found; tensors as small as here are partitioned."""
    x = values_of(values, (3, 333), dtype)
    counts = [[100, 20], [1, 0], [333, 332]]
    mask = kept_by_counting(x, counts, block, **WAYS[way])
    for row, mine, (outer, inner) in zip(mask, x.numpy(), counts, strict=True):
        expected = kept_by_sorting(mine, outer) & ~kept_by_sorting(mine, inner)
        assert (row == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.integers(0, 45), st.integers(1, 9))
def test_exactly_k_are_kept_even_with_ties(values: list[int], count: int, block: int) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    mask = kept_by_counting(x, [[count, 0]], block)
    assert mask.sum() == min(count, len(values))
    assert (mask[0] == kept_by_sorting(x[0].numpy(), count)).all()


@pytest.mark.parametrize("values", ["normal", "bfloat16", "sorted", "mostly zero", "two"])
def test_the_bracket_and_the_digits_agree_where_it_pays(values: str) -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2, selection.SAMPLING_PAYS + 12345, generator=generator) * 0.01
    if values == "bfloat16":
        x = x.bfloat16().float()
    elif values == "sorted":  # the sampled blocks differ from all others
        x = x.sort(1).values
    elif values == "mostly zero":
        x = x * (x > 0.01)
    elif values == "two":
        x = x.sign() * 0.5 + x.abs().round()
    counts = [[x.shape[1] // 3, x.shape[1] // 50], [x.shape[1] // 2, 1]]
    found = select(largest(x.shape[1], counts, double=x.dtype == torch.float64), blocks_of(x, 1 << 15).reduce)
    ranks = {(i, k): count for i, row in enumerate(counts) for k, count in enumerate(row)}
    blocks = blocks_of(x, 1 << 15)
    digits = select(selection.by_digits(2, ranks, False), blocks.reduce)
    assert {key: found[key[0]][key[1]].threshold for key in ranks} == {key: digits[key].bits for key in ranks}
    assert select(selection.cuts(digits, True), blocks.reduce) == {
        (i, k): None if (cut := found[i][k].cut) == x.shape[1] and digits[i, k].ordinal == digits[i, k].equal else cut
        for i, k in ranks
    }


def test_the_bracket_is_the_way_for_ordinary_deltas() -> None:
    x = torch.randn(1, 1 << 20, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    found = select(selection.by_bracket(x.shape[1], {(0, 0): 300_000}), blocks_of(x, 1 << 16).reduce)
    assert found[0, 0].bits == int(magnitude_bits(x[0]).sort(descending=True).values[299_999])
    assert sum(found[0, 0].per_block or []) == found[0, 0].equal > 1


@pytest.mark.parametrize("values", ["float64", "bfloat16", "mostly zero", "all zero", "sorted", "two"])
@pytest.mark.parametrize("way", [{"sampling_pays": 0}, {"sampling_pays": 0, "collected": 1}, {}])
def test_a_share_of_those_that_are_not_zero(values: str, way: dict[str, Any]) -> None:
    """In one pass by a bracket, and where that fails or does not pay by digits: as by sorting."""
    x = torch.randn(1, 30_011, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 0.01
    if values == "bfloat16":
        x = x.bfloat16().double()
    elif values == "mostly zero":
        x = x * (x > 0.012)
    elif values == "all zero":
        x = x * 0
    elif values == "sorted":
        x = x.sort(1).values * (torch.arange(x.shape[1]) > 9000)
    elif values == "two":
        x = x.sign() * 0.5 + (x > 0.01)
    for share in (0.001, 0.1, 0.9):
        blocks = blocks_of(x, 1 << 10)
        found = select(largest_of_nonzero(x.shape[1], share, double=True, **way), blocks.reduce)
        count = int(np.count_nonzero(x.numpy()) * share)
        local = Ranks([(found, NONE)]).at(0, x.shape[1], x.dtype)
        assert ((local.mask(0, x[0]) != 0).numpy() == kept_by_sorting(x[0].numpy(), count)).all()


def test_without_a_cut_all_that_equal_the_threshold_are_kept() -> None:
    x = torch.tensor([[3.0, -1.0, 1.0, 1.0, 0.5]])
    ((found,),) = select(
        largest(x.shape[1], [[2]], double=x.dtype == torch.float64, exact=False), blocks_of(x, 2).reduce
    )
    local = Ranks([(found, NONE)]).at(0, 5, x.dtype)
    assert (local.mask(0, x[0]) != 0).tolist() == [True, True, True, True, False]


def splitmix64(state: int) -> int:
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_splitmix64_has_its_published_first_numbers() -> None:
    # The first outputs of the generator seeded with 1234567, as listed with its reference implementation.
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64((1234567 + i * golden) % 2**64) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]


def test_random_words_are_splitmix64_of_the_index() -> None:
    for key_ in (0, 99, 2**63 - 1):
        expected = [splitmix64((key_ + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, 12)]
        assert [word % 2**64 for word in words(torch.tensor(key_), 11).tolist()] == expected


def tossed(coins: Coins, start: int, count: int) -> torch.Tensor:
    """bool [n, count]: the entries that the coins keep."""
    local, x = coins.at(start, count, torch.float32), torch.zeros(count)
    return torch.stack([local.mask(i, x) for i in range(len(coins.keys))]) != 0


@pytest.mark.parametrize(("start", "count"), [(0, 1), (4, 9), (6, 8), (64, 36)])
def test_a_mask_depends_on_the_index_alone(start: int, count: int) -> None:
    coins = Coins((5, 2**64 - 1), (0.3, 0.8))
    assert torch.equal(tossed(coins, start, count), tossed(coins, 0, 100)[:, start : start + count])


def test_a_mask_keeps_its_density() -> None:
    n, density = 1 << 20, 0.3
    mask = tossed(Coins((key(0, "w", 0), 7, 7), (density, 1.0, 1e-12)), 0, n)
    assert abs(int(mask[0].sum()) - density * n) < 5 * (n * density * (1 - density)) ** 0.5
    assert bool(mask[1].all()) and not bool(mask[2].any())


def test_masks_of_different_keys_are_independent() -> None:
    n = 1 << 18
    one, two = tossed(Coins([key(0, "w", i) for i in (0, 1)], (0.5, 0.5)), 0, n)
    assert abs(int((one & two).sum()) - n / 4) < 5 * (n * 3 / 16) ** 0.5
    even, odd = one[::2], one[1::2]  # the two halves of a word
    assert abs(int((even & odd).sum()) - n / 8) < 5 * (n * 3 / 32) ** 0.5
    assert len({key(s, t, p) for s in (0, 1) for t in ("a", "b") for p in (0, 1)}) == 8


def test_bit_operations() -> None:
    x = torch.tensor([1.5, -2.0, 0.0, -0.0])
    mask = mask_above(magnitude_bits(x), magnitude_bits(torch.tensor([1.75]))[0])
    assert mask.tolist() == [0, -1, 0, 0]
    assert apply_mask(x, mask).tolist() == [0.0, -2.0, 0.0, 0.0]
    assert flip_signs(x, negative(x)).tolist() == [1.5, 2.0, 0.0, -0.0]
    assert (negative(x) != 0).tolist() == (x < 0).tolist()  # -0 is not below 0, nor in compiled code


@pytest.mark.parametrize("block", [4, 12, 100])
def test_sums_equal_numpy(block: int) -> None:
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    blocks, wide = blocks_of(x, block), x.double().numpy()
    assert np.allclose(blocks.reduce(Gram()), wide @ wide.T, rtol=1e-14)
    matrix = wide.reshape(3, 12, 4)
    assert np.allclose(blocks.reduce(RowGram(4)), np.einsum("irc,jrc->rij", matrix, matrix), rtol=1e-14, atol=1e-15)
    assert np.allclose(blocks.reduce(ColumnGram(4)), np.einsum("irc,jrc->cij", matrix, matrix), rtol=1e-14, atol=1e-15)

    coins = Coins((1, 2, 3), (0.5, 0.5, 0.5))
    sums, kept = blocks.reduce(L1(coins)).numpy(), tossed(coins, 0, 48).numpy()
    assert np.allclose(sums, np.stack([np.abs(wide).sum(1), (np.abs(wide) * kept).sum(1)], 1), rtol=1e-14)
    assert int(blocks.reduce(SignBalance((1.0, 1.0, -2.0), None))) == np.sign(wide[0] + wide[1] - 2 * wide[2]).sum()


def test_weights_by_row_and_by_column() -> None:
    x = torch.arange(24.0).reshape(2, 12)
    matrix = x.reshape(2, 3, 4)
    rows = Spread(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), 4)
    expected = torch.einsum("rn,nrc->rc", rows.weights, matrix).reshape(-1)
    assert torch.equal(weighted_sum(list(x), None, rows.at(0, 12, x.dtype)), expected)
    assert torch.equal(weighted_sum(list(x[:, 4:]), None, rows.at(4, 8, x.dtype)), expected[4:])
    columns = Spread(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [2.0, -1.0]]), 4, columns=True)
    expected = torch.einsum("cn,nrc->rc", columns.weights, matrix).reshape(-1)
    assert torch.equal(weighted_sum(list(x), None, columns.at(0, 12, x.dtype)), expected)


def nearest(value: float, dtype: torch.dtype) -> float:
    """The number of `dtype` nearest to value, ties to even, by exact comparison of the neighbours."""
    start = torch.tensor(value).to(dtype).view(torch.int16)
    around = [(start + step).view(dtype) for step in (-1, 0, 1)]
    exact = Fraction(value)

    def distance(candidate: torch.Tensor) -> tuple[Fraction, int]:
        return abs(Fraction(candidate.item()) - exact), int(candidate.view(torch.int16)) & 1

    return min((c for c in around if bool(c.isfinite())), key=distance).item()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**16 - 1), st.integers(-3, 3), st.sampled_from([torch.bfloat16, torch.float16]))
def test_rounding_is_done_once(bits: int, offset: int, dtype: torch.dtype) -> None:
    low = torch.tensor(bits - 2**15, dtype=torch.int16).view(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    if not (bool(low.isfinite()) and bool(high.isfinite())) or (low < 0) != (high < 0):
        return
    middle = (low.double() + high.double()) / 2  # a tie, then a hair off it: less than float32 can show
    value = middle * (1 + offset * 2.0**-45)
    assert round_once(value.reshape(1), dtype).item() == nearest(value.item(), dtype)


def test_rounding_keeps_nan_and_infinity() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e300, -0.0, 1e-300], dtype=torch.float64)
    rounded = round_once(x, torch.bfloat16)
    assert torch.equal(rounded.isnan(), x.isnan()) and rounded[[0, 1, 3]].tolist() == [torch.inf, -torch.inf, torch.inf]
    assert rounded[4].item() == 0 and rounded[5].item() < 1e-37


@pytest.mark.parametrize("most", [1, 3, 40])
def test_exp_by_its_series_is_exp(most: int) -> None:
    x = torch.linspace(0, most, 1001, dtype=torch.float64)
    assert np.allclose(exp(x, most).numpy(), np.exp(x.numpy()), rtol=32 * most * 2.0**-52, atol=0)
    assert exp(x, most)[0] == 1
