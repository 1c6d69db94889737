"""Coins that depend on ranks give the same masks and sums by compiled code as by torch's stable sort and sums."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lfm.engine.blocks import StoredBlock
from mergekit_lfm.kernels import ranked
from mergekit_lfm.kernels.bits import sums_of_magnitudes
from mergekit_lfm.kernels.compiled import Kernels
from mergekit_lfm.kernels.libraries import compiler
from mergekit_lfm.kernels.order import by_rank_on_device
from mergekit_lfm.kernels.random import RankedCoins, ranked_mask, ranked_sums, words
from mergekit_lfm.kernels.step import Step, run_eagerly

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

SPECIAL = (0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0001, 1e-45, -1e-30, 2.0, 3e38, *map(float, ("inf", "-inf", "nan")))
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
KEYS = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def native() -> Iterator[ranked.Native]:
    with tempfile.TemporaryDirectory() as folder:
        ranked.compile_source(Path(folder), "ranked")
        (library,) = Path(folder).iterdir()
        yield ranked.load(library)


def check(native: ranked.Native, x: torch.Tensor, row: int, key: int = 5) -> bool:
    """The mask is that of the formula in torch, x is as it was, and sums, if there are some, are exact; true if so."""
    before = x.clone()
    limits = torch.linspace(2**30, -(2**30), row, dtype=torch.float64).to(torch.int32)
    state = torch.tensor(key)
    numbers = words(state, (len(x) + 1) // 2).view(torch.int32)[: len(x)] >> 1
    expected = -(numbers < by_rank_on_device(x, limits)).to(torch.int8)
    mask, sums = native(state, x, None, limits)
    assert torch.equal(mask, expected)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
    if sums is None:
        return False
    assert sums.tolist() == [math.fsum(part.abs().tolist()) for part in (x, x[mask < 0])]
    assert torch.equal(sums, sums_of_magnitudes(x, mask))
    return True


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 20), KEYS)
def test_masks_of_any_numbers(native: ranked.Native, data: st.DataObject, row: int, key: int) -> None:
    count = row * data.draw(st.integers(1, 8))
    values = data.draw(st.lists(VALUES, min_size=count, max_size=count))
    check(native, torch.tensor(values), row, key)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from((1, 7, 64, 1088, 20_000)))
def test_masks_of_changes_of_models(native: ranked.Native, seed: int, row: int) -> None:
    """As in bfloat16, with many equals, many zeros, and a few of many digits; and of numbers with all digits."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3 * row, generator=generator) * 0.02
    tune = base + 0.001 * torch.randn(3 * row, generator=generator) * (torch.rand(3 * row, generator=generator) > 0.4)
    change = tune.bfloat16().float() - base.bfloat16().float()
    assert check(native, change, row)
    limits = torch.linspace(2**30, -(2**30), row, dtype=torch.float64).to(torch.int32)
    mask, sums = native(KEY, tune.bfloat16(), base.bfloat16(), limits)
    expected, totals = native(KEY, change, None, limits)
    assert torch.equal(mask, expected) and sums is not None and totals is not None and torch.equal(sums, totals)
    check(native, tune - base, row)
    further = torch.rand(len(base), generator=generator) < torch.rand(len(base), generator=generator) / 4
    check(native, torch.where(further, tune - base, change), row)  # some rows are sorted as a whole, others in part


@pytest.mark.parametrize(
    ("numbers", "exact"),
    [
        ((2.0**25, 2.0**-26), True),
        ((2.0**26, 2.0**-26), False),  # this one is a float64, those of several such pairs are not
        ((3 * 2.0**-126,), True),
        ((2.0**-130, 2.0**-126), False),  # a subnormal number
        ((3e38, -3e38), True),
        ((1.0, math.inf), False),
        ((1.0, math.nan), False),
        ((0.0, -0.0), True),
        ((), True),
    ],
)
def test_sums_are_left_to_torch_where_their_order_might_matter(
    native: ranked.Native, numbers: tuple[float, ...], exact: bool
) -> None:
    """Wherever among zeros the numbers are; the compiled code never gives a sum of others."""
    for at in range(0, 200, 67):
        x = torch.zeros(210)
        x[at : at + len(numbers)] = torch.tensor(numbers)
        assert check(native, x, 210) == exact
    kernels = Kernels("never", 0, 4096, 1)
    masks = ranked.RankedMasks(kernels._libraries, compiles=False)
    masks._native, masks._sought = native, True
    block, limits = StoredBlock((x,), None, 0, torch.float32, run_eagerly, len(x)), torch.zeros(210, dtype=torch.int32)
    found, expected = masks.with_sums(KEY, block, 0, limits), ranked_sums(KEY, block, 0, limits)
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(found, expected, strict=True))


def test_masks_where_nearly_all_share_a_slot(native: ranked.Native) -> None:
    """Beside a much larger one: too many to be moved one by one. In the next row they already are in order."""
    x = torch.rand(2, 5000, generator=torch.Generator().manual_seed(1))
    x[1] = x[1].sort(descending=True).values
    x[:, 7] = 1e30
    check(native, x.reshape(-1), 5000)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mergekit_lfm" / "kernels"


X, KEY, LIMITS = torch.arange(12.0), torch.tensor(3), torch.tensor([2**30, 0, -(2**30)], dtype=torch.int32)


def find_mask(kernels: Kernels) -> torch.Tensor:
    """A mask for which the compiled code is sought."""
    with kernels:
        mask = kernels.ranked_mask(KEY, X, LIMITS)
    assert torch.equal(mask, ranked_mask(KEY, X, LIMITS))
    return mask


def test_the_library_is_kept_for_the_next_run(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled if there are many blocks; later ones find it; a changed one is compiled anew."""
    find_mask(Kernels("auto", ranked.PAYS, 4096, 1))
    (library,) = own_cache.glob("*.so")
    library.unlink()  # this process has mapped it
    library.write_bytes(b"foreign code")
    kernels = Kernels("always", 0, 4096, 1)
    find_mask(kernels)
    assert kernels.problems == {f"{library} was changed after it was compiled, and is not used; it was removed"}
    (library,) = own_cache.glob("*.so")
    loaded = list[Path]()

    def load(library: Path) -> ranked.Native:
        loaded.append(library)
        return lambda key, x, _, limits: (ranked_mask(key, x, limits), None)

    monkeypatch.setattr(ranked, "load", load)
    find_mask(Kernels("auto", 0, 4096, 1))
    assert loaded == [library]
    find_mask(Kernels("never", 10**9, 4096, 1))
    assert loaded == [library]


def test_nothing_is_compiled_that_does_not_pay(own_cache: Path) -> None:
    for kernels in (Kernels("auto", ranked.PAYS - 1, 4096, 1), Kernels("never", 10**9, 4096, 1)):
        find_mask(kernels)
    assert not own_cache.exists()


@pytest.mark.usefixtures("own_cache")
def test_a_failed_compilation_is_reported_and_numpy_finds_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    kernels = Kernels("always", 0, 4096, 1)
    find_mask(kernels)
    (problem,) = kernels.problems
    assert problem.startswith("ranked_mask runs without being compiled: ")


@pytest.mark.usefixtures("own_cache")
def test_numbers_of_64_bits_and_the_longest_rows_are_left_to_numpy() -> None:
    kernels = Kernels("always", 0, 4096, 1)
    long = torch.rand(ranked.LONGEST + 1)
    limits = torch.zeros(len(long), dtype=torch.int32)
    for x, each in ((X.double(), LIMITS), (long, limits)):
        assert torch.equal(kernels.ranked_mask(KEY, x, each), ranked_mask(KEY, x, each))


def mask_of(_: object, __: object, local: torch.Tensor) -> torch.Tensor:
    return local


class Counted:
    """Runs eagerly, and makes masks of its own."""

    def __call__(self, step: Step) -> torch.Tensor:
        masks: torch.Tensor = run_eagerly(step).masks
        return masks

    def ranked_mask(self, _: torch.Tensor, x: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x),), -1, dtype=torch.int8)


def test_the_runner_of_a_block_makes_its_masks() -> None:
    block = StoredBlock((X, X), None, 0, torch.float32, Counted(), 12)
    local = RankedCoins((1, 2), ((0.2, 0.8), (0.1, 0.2)), 3).at(0, 12, torch.float32)
    assert torch.equal(block.each(mask_of, local), torch.full((2, 12), -1, dtype=torch.int32))
