"""The quick order of entries in rows is torch's stable sort; masks that depend on it, found once for a block."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lfm.engine.blocks import Blocks, StoredBlock
from mergekit_lfm.kernels import random
from mergekit_lfm.kernels.order import by_rank, by_rank_on_device
from mergekit_lfm.kernels.random import Known, LocalMasks, RankedCoins, settle, words, words_on_host
from mergekit_lfm.kernels.reductions import L1
from mergekit_lfm.kernels.step import run_eagerly

FLOATS = (torch.float32, torch.float64)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0001, 1e-45, -1e-30, 2.0, 3e38, *map(float, ("inf", "-inf", "nan")))
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))


def check(x: torch.Tensor, row: int) -> None:
    """The ranks are those of torch's sort, and x is as it was."""
    before, ranks = x.clone(), torch.arange(row, dtype=torch.int32)
    assert torch.equal(by_rank(x, ranks), by_rank_on_device(x, ranks))
    assert torch.equal(x.view(torch.uint8), before.view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 12), st.sampled_from(FLOATS))
def test_ranks_of_any_numbers(data: st.DataObject, row: int, dtype: torch.dtype) -> None:
    count = row * data.draw(st.integers(1, 8))
    values = data.draw(st.lists(VALUES, min_size=count, max_size=count))
    check(torch.tensor(values, dtype=dtype), row)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from((1, 2, 100, 1088, 70_000)), st.sampled_from(FLOATS))
def test_ranks_of_changes_of_models(seed: int, row: int, dtype: torch.dtype) -> None:
    """As in bfloat16, with many equals, many zeros, and a few of many digits; and of numbers with all digits."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3 * row, generator=generator) * 0.02
    tune = base + 0.001 * torch.randn(3 * row, generator=generator) * (torch.rand(3 * row, generator=generator) > 0.4)
    check(tune.bfloat16().to(dtype) - base.bfloat16().to(dtype), row)
    check((tune - base).to(dtype), row)


def test_ranks_where_16_bits_mislead() -> None:
    """Numbers that differ in their last bits only, or are far below the row's largest; beside rows in which none do."""
    few = [1.0, 1 + 2**-20, 1 + 2**-21, 1 + 2**-23, 1.5, 2**-40, 2**-60, 2**-41]
    rows = torch.zeros(5, 64)
    rows[1, ::8], rows[3, 5::8] = torch.tensor(few), torch.tensor(few)
    rows[:, 1] = 1.0
    check(rows.reshape(-1), 64)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 50))
def test_words_are_the_same_in_numpy(key: int, count: int) -> None:
    assert torch.equal(words_on_host(torch.tensor(key), count), words(torch.tensor(key), count))


ROW = 24
COINS = RankedCoins((3, 2**63 + 5), ((0.2, 0.8), (0.5, 0.5)), ROW)


def a_block(count: int, known: Known | None = None) -> StoredBlock:
    generator = torch.Generator().manual_seed(1)
    stored = tuple(torch.randn(count, generator=generator).bfloat16() for _ in range(2))
    base = torch.randn(count, generator=generator).bfloat16()
    return StoredBlock(stored, base, 0, torch.float32, run_eagerly, count, known=known)


def test_masks_take_the_place_of_coins_that_depend_on_ranks() -> None:
    block = a_block(5 * ROW)
    local = COINS.at(0, 5 * ROW, torch.float32)
    number = torch.ones(1)
    settled = settle((None, local, (True, number)), block)
    assert settled[0] is None and settled[2][0] is True and settled[2][1] is number
    for i in range(2):
        assert torch.equal(settled[1].mask(i, block.row(i)), local.mask(i, block.row(i)).int())
    same = (None, (True, number))
    assert settle(same, block) is same


class Found:
    """The masks of one block, as they were found."""

    def __init__(self, masks: LocalMasks) -> None:
        self.masks = masks

    def at(self, *_: object) -> LocalMasks:
        return self.masks


def test_sums_over_masks_by_rank_are_those_of_the_masks_found() -> None:
    """Row by row as all at once."""
    block = a_block(5 * ROW)
    found = Found(block.settle(COINS.at(0, 5 * ROW, torch.float32)))
    assert torch.equal(L1(COINS).block(block), L1(found).block(block))


def cut(row: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return row[start:stop]


def test_masks_are_found_once_and_kept_by_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each block of a tensor; a tensor that is not held finds them again."""
    x = torch.randn(2, 10 * ROW, generator=torch.Generator().manual_seed(1))
    calls = list[int]()

    def count_calls(x: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return by_rank(x, limits)

    monkeypatch.setattr(random, "by_rank", count_calls)
    sums: list[Any] = []
    for known, times in ((Known(), 2 * 4), (None, 2 * 2 * 4)):
        blocks = Blocks([partial(cut, row) for row in x], None, 10 * ROW, 3 * ROW, x.dtype, known=known)
        calls.clear()
        sums.append(blocks.reduce(L1(COINS)))
        for i in range(len(blocks)):
            block = blocks.load(i)
            block.settle(COINS.at(block.start, block.count, block.dtype))
        assert len(calls) == times
        assert known is None or sum(kept.nbytes for kept in known.values()) == 2 * 10 * ROW // 8
    assert all(torch.equal(total, sums[0]) for total in sums)
