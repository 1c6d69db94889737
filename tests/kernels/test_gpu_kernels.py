"""GPU kernels against their formulas: by Triton's interpreter on machines without a GPU, else on the GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cases import cases
from helpers_gpu import needs_triton, stand_in
from test_fused import BLOCK, COINS, FUNCTIONS, RANKS, bits, inputs_of, stored_block
from test_kernels import blocks_of, kept_by_sorting, values_of

from mergekit_lfm.engine.blocks import StoredBlock, run_solve
from mergekit_lfm.kernels import bracket, gpu, selection
from mergekit_lfm.kernels.bits import magnitude_bits
from mergekit_lfm.kernels.block import LANES
from mergekit_lfm.kernels.emit import COUNT, Unsupported, emit
from mergekit_lfm.kernels.gpu import LEAST, GpuKernels
from mergekit_lfm.kernels.lanes import grams, sums
from mergekit_lfm.kernels.ranks import largest
from mergekit_lfm.kernels.step import Step, run_eagerly, take_apart
from mergekit_lfm.kernels.sums import Spread, Weights, weighted_sum

LONG = pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="takes minutes more: LONG_TESTS=1 runs it")
DEVICE = stand_in().device
VALUES = ["normal", "bfloat16", "equal", "zero", "few", "subnormal"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPE_AND_BASE = [(torch.float32, False), (torch.bfloat16, True), (torch.float64, True)]


class Native:
    """A `Run` with which a chunk uses kernels, or does not."""

    def __init__(self, native: bool) -> None:
        self.native = native

    def __call__(self, step: Step) -> Any:
        return run_eagerly(step)


def chunk_of(
    rows: Sequence[torch.Tensor], size: int, *, base: torch.Tensor | None = None, native: bool = False
) -> StoredBlock:
    """A chunk of blocks of `size` elements on the device."""
    dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    stored = tuple(x.to(DEVICE) for x in rows)
    return StoredBlock(stored, None if base is None else base.to(DEVICE), 0, dtype, Native(native), size)


# ------------------------------------------------------------------ elementwise functions


@needs_triton
@pytest.mark.parametrize(("name", "dtype", "count"), cases(list(FUNCTIONS), DTYPES, [BLOCK, 2 * BLOCK - 333]))
def test_a_kernel_has_the_bits_of_its_function(name: str, dtype: torch.dtype, count: int) -> None:
    function, coefficients, out = FUNCTIONS[name]
    inputs, base = inputs_of(name, dtype)
    stored = tuple(x.repeat(3)[:count] for x in inputs)
    wide = None if base is None else base.repeat(3)[:count]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    local = coefficients.at(2 * BLOCK, count, compute)
    expected = run_eagerly(Step(function, stored, wide, local, compute, out))
    with DEVICE:
        local = coefficients.at(2 * BLOCK, count, compute)
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    kernels = GpuKernels("always", 0, DEVICE)
    there = tuple(x.to(DEVICE) for x in stored), None if wide is None else wide.to(DEVICE)
    found = kernels(Step(function, *there, local, compute, out, flag))
    assert kernels.native and not kernels.problems and not kernels._unfit
    assert all(torch.equal(a.cpu(), b) for a, b in zip(bits(found), bits(expected), strict=True))
    assert not flag


@needs_triton
def test_weights_of_their_own_for_every_row_are_taken() -> None:
    (first, second, _), base = stored_block(torch.bfloat16)
    rows = torch.rand(BLOCK // 64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for coefficients in (Spread(rows, 64), Spread(rows, BLOCK // 64, columns=True)):
        step = Step(weighted_sum, (first, second), base, coefficients.at(0, BLOCK, torch.float32), torch.float32, None)
        kernels = GpuKernels("always", 0, DEVICE)
        with DEVICE:
            local = coefficients.at(0, BLOCK, torch.float32)
        there = Step(weighted_sum, (first.to(DEVICE), second.to(DEVICE)), base.to(DEVICE), local, torch.float32, None)
        assert torch.equal(kernels(there).cpu(), run_eagerly(step)) and not kernels.problems


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize(
    ("bad", "where"), [("nan", 0), ("nan", 3), ("-inf", 1), ("-inf", 3), ("overflow", 0), ("overflow", 1)]
)
def test_values_that_are_not_finite_are_flagged(native: bool, bad: str, where: int) -> None:
    """NaN and infinity in any input, and a result that is too large for its dtype."""
    stored, base = stored_block(torch.float16)
    assert base is not None
    tensors = [*stored, base]
    tensors[where][BLOCK - 1] = 60_000.0 if bad == "overflow" else float(bad)
    if bad == "overflow":
        tensors[(where + 1) % 3][BLOCK - 1], base[BLOCK - 1] = 60_000.0, -60_000.0
    kernels = GpuKernels("always" if native else "never", 0, DEVICE)
    with DEVICE:
        local = Weights((1.0, 1.0, 1.0)).at(0, BLOCK, torch.float32)
    for count, noted in ((BLOCK - 1, False), (BLOCK, True)):
        flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        there = [torch.cat([x[:count], x[:1]]).to(DEVICE) for x in tensors]
        kernels(Step(weighted_sum, tuple(there[:3]), there[3], local, torch.float32, torch.float16, flag))
        assert bool(flag) == noted


@needs_triton
def test_small_blocks_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = GpuKernels("always", 0, DEVICE)
    step = Step(
        weighted_sum, (torch.ones(LEAST - 1),), None, Weights((2.0,)).at(0, 1, torch.float32), torch.float32, None
    )
    monkeypatch.setattr(gpu, "kernel_of", None)
    assert bool((kernels(step) == 2).all())


def test_small_merges_use_no_kernels() -> None:
    assert not GpuKernels("auto", 10**6, DEVICE).native and not GpuKernels("never", 10**12, DEVICE).native


def _with_sine(rows: Any, base: Any, local: Any) -> torch.Tensor:
    del base, local
    x: torch.Tensor = rows[0]
    return x.sin()


@needs_triton
def test_a_function_without_a_kernel_is_reported_and_runs_eagerly() -> None:
    kernels = GpuKernels("always", 0, DEVICE)
    x = torch.rand(BLOCK, device=DEVICE)
    found = kernels(Step(_with_sine, (x,), None, None, torch.float32, None))
    assert torch.equal(found, x.sin())
    assert kernels.problems == {
        "_with_sine runs on the GPU without being compiled: Unsupported: the operation sin.default"
    }


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: -x, "the operation neg.default"),
        (lambda x: torch.add(x, x, alpha=2), "a sum with a factor"),
        (lambda x: x.clamp(max=1), "the operation clamp.default|clamp from above|argument"),
        (lambda x: x.double() + x, "of torch.float"),
        (lambda x: x.double().bfloat16(), "rounds twice"),
        (lambda x: x.sum(), "a result of shape|the operation sum"),
        (lambda x: x.view(2, -1), "a result of shape"),
        (lambda x: x.view(torch.int32).view(torch.int16), "a result of shape|view of"),
    ],
)
def test_functions_that_might_round_differently_are_refused(function: Any, what: str) -> None:
    with pytest.raises(Unsupported, match=what):
        emit(function, [torch.zeros(COUNT)], 1)


def test_without_triton_all_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(gpu, "unusable", gpu.unusable.__wrapped__)
    kernels = GpuKernels("always", 0, DEVICE)
    (problem,) = kernels.problems
    assert not kernels.native and problem.startswith("the GPU runs without kernels of Triton: ModuleNotFoundError: ")


@needs_triton
def test_kernels_that_round_otherwise_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of older versions make 0 of subnormal quotients."""
    made = gpu.kernel_of

    def flushing(fused: Any) -> Any:
        return lambda step: tuple(torch.where(x.abs() < 2.0**-126, 0.0, x) for x in made(fused)(step))

    assert gpu.unusable.__wrapped__(DEVICE) == ""
    monkeypatch.setattr(gpu, "kernel_of", flushing)
    assert "round differently from the processor" in gpu.unusable.__wrapped__(DEVICE)


@needs_triton
def test_a_kernel_that_triton_cannot_make_is_reported_and_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import PTXASError

    def fails(*_: object, **__: object) -> None:
        raise PTXASError("no such architecture")

    kernels = GpuKernels("always", 0, DEVICE)
    monkeypatch.setattr(gpu, "launch", fails)
    x = torch.rand(BLOCK, device=DEVICE)
    step = Step(weighted_sum, (x,), None, Weights((2.0,)).at(0, BLOCK, torch.float32).to(DEVICE), torch.float32, None)
    assert torch.equal(kernels(step), x * 2) and len(kernels.problems) == 1
    assert torch.equal(kernels(step), x * 2)
    monkeypatch.setattr(gpu, "unusable", gpu.unusable.__wrapped__)
    assert not GpuKernels("always", 0, DEVICE).native


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_any_nan_that_a_device_makes_is_nan_and_flagged(bits: int) -> None:
    """NVIDIA's NaN has all bits set, and would be rounded to -0."""
    flag, nan = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.tensor([bits], dtype=torch.int32)
    x = nan.view(torch.float32).repeat(BLOCK).to(DEVICE)
    kernels = GpuKernels("always", 0, DEVICE)
    found = kernels(Step(_first, (x,), None, None, torch.float32, torch.bfloat16, flag))
    assert bool(found.isnan().all()) and bool(flag) and not kernels._unfit


def _first(rows: Any, base: Any, local: Any) -> torch.Tensor:
    del base, local
    x: torch.Tensor = rows[0]
    return x.abs()


COMPILE = """
import re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mergekit_lfm.kernels import gpu
from mergekit_lfm.kernels.native import bracket, sums
from mergekit_lfm.kernels.step import Step
from test_fused import FUNCTIONS, inputs_of
import test_fused

NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
         torch.int32: "*i32", torch.int64: "*i64"}

def check(name, kernel, signature, constants):
    target = GPUTarget("cuda", int(sys.argv[2]), 32)
    made = triton.compile(ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants),
                          target=target, options={"enable_fp_fusion": False})
    wrong = r"\\bfma\\.\\S+|\\S+\\.ftz\\S*|div\\.(?:full|approx)\\S*|atom\\S*\\.add\\S*\\.f\\d+"
    found = re.findall(wrong, made.asm["ptx"])
    assert len(made.asm["cubin"]) and not found, (name, target, found)

for dtype in (getattr(torch, sys.argv[1]),):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for name, (function, coefficients, out) in FUNCTIONS.items():
        stored, base = inputs_of(name, dtype)
        local = coefficients.at(0, test_fused.BLOCK, compute)
        fused = gpu._fused(Step(function, stored, base, local, compute, out))
        source = gpu.source_of(fused)
        kernel = gpu.build(source.text, name)
        kinds = [NAMES[kind] for kind, _ in fused.leaves()] + [NAMES[kind] for kind in source.outputs]
        signature = dict(zip(kernel.arg_names, [*kinds, "*i32", "i32"]))
        check(name, kernel, signature, {"BLOCK": 1024})
    wide = "*i64" if dtype == torch.float64 else "*i32"
    kinds = [NAMES[dtype], NAMES[dtype], wide, "*i32", wide, "*i32", "i32", "i32"]
    constants = {"PIVOTS": 5, "BASE": True, "TILE": bracket.TILE}
    check("bracket", bracket._bracket, dict(zip(bracket._bracket.arg_names, kinds)), constants)
    kernel = sums._summing(((0, 0), (1, 0), (1, 1), (0,)), True, dtype == torch.float64)
    kinds = [NAMES[dtype]] * 3 + ["*fp64", "i32", "i32", "i32"]
    constants = {"LANES": 4096, "SIDE": sums.SIDE, "ROWS": sums.ROWS}
    check("sums", kernel, dict(zip(kernel.arg_names, kinds)), constants)
print("compiled")
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [
        ("bfloat16", "90"),
        ("float64", "80"),
        pytest.param("bfloat16", "80", marks=LONG),
        pytest.param("float64", "90", marks=LONG),
    ],
)
def test_compiled_kernels_contract_nothing_and_divide_exactly(dtype: str, architecture: str) -> None:
    """For an architecture, on any machine: what the compiler makes has no fused, flushed or approximate operation."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", COMPILE, dtype, architecture]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "compiled", found.stderr[-2000:]


def test_kernels_are_launched_without_contraction() -> None:
    """Triton contracts by default."""
    options: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, _: tuple[int, ...]) -> Any:
            return lambda *_, **given: options.update(given)

    gpu.launch(Kernel(), (1,), torch.zeros(1), BLOCK=8)
    assert options == {"BLOCK": 8, "enable_fp_fusion": False}


# ------------------------------------------------------------------ counting


def triton_if_native(*values: Any) -> Any:
    """The mark of a combination whose last value says whether kernels are used."""
    return needs_triton if values[-1] else ()


SIZES = [(0, 7), (1, 7), (4096, 4096), (5000, 2500), (9001, 3000)]
BRACKETS = cases(VALUES, DTYPE_AND_BASE, SIZES, [False, True], needs=triton_if_native)


@pytest.mark.parametrize(("kind", "dtype_and_base", "count_and_size", "native"), BRACKETS)
def test_a_bracket_counts_as_numpy_does(
    kind: str, dtype_and_base: tuple[torch.dtype, bool], count_and_size: tuple[int, int], native: bool
) -> None:
    (dtype, based), (count, size) = dtype_and_base, count_and_size
    x = values_of(kind, (count,), dtype)
    base = values_of("few", (count,), dtype).roll(1) if based else None
    wide = x.double() if dtype == torch.float64 else x.float()
    delta = wide if base is None else wide - base.to(wide.dtype)
    magnitudes: Any = delta.abs().numpy().view(np.int64 if dtype == torch.float64 else np.int32)
    order = np.sort(magnitudes)[::-1]
    pivots = sorted({int(order[int(share * (count - 1))]) for share in (0.2, 0.5, 0.8) if count}, reverse=True) or [1]
    counts, inside = bracket.count_bracket(chunk_of([x], size, base=base, native=native), 0, pivots)
    parts = [magnitudes[first : first + size] for first in range(0, count, size)]
    expected = [[(part > pivots[0]).sum(), *((part == pivot).sum() for pivot in pivots)] for part in parts]
    assert counts.tolist() == [[int(n) for n in row] for row in expected]
    rest = magnitudes[(magnitudes < pivots[0]) & (magnitudes > pivots[-1]) & ~np.isin(magnitudes, pivots)]
    assert np.array_equal(np.sort(inside.cpu().numpy()), np.sort(rest))


CHUNKS = [(7, 16), (64, 4), (1000, 1)]  # elements of a block, blocks of a chunk
WAYS: dict[str, dict[str, Any]] = {
    "partition": {},
    "digits": {"few": 0},
    "bracket": {"few": 0, "sampling_pays": 1, "collected": 1 << 20},
    "few collected": {"few": 0, "sampling_pays": 1, "collected": 3},
}
LARGEST = cases(VALUES, [torch.float32, torch.float64], CHUNKS, list(WAYS))


@pytest.mark.parametrize(("kind", "dtype", "chunk", "way"), LARGEST)
def test_the_largest_in_chunks_are_those_a_stable_sort_finds(
    kind: str, dtype: torch.dtype, chunk: tuple[int, int], way: str
) -> None:
    block, at_once = chunk
    x = values_of(kind, (2, 333), dtype)
    counts = [[100, 20], [1, 332]]
    blocks = blocks_of(x.to(DEVICE), block, stand_in(), at_once)
    solve: Any = largest(x.shape[1], counts, double=x.dtype == torch.float64, **WAYS[way])
    found: Any = run_solve(solve, blocks.reduce)
    for row, sets, wanted in zip(x.numpy(), found, counts, strict=True):
        bits = np.abs(row).view(np.int64 if dtype == torch.float64 else np.int32)
        for largest_of, count in zip(sets, wanted, strict=True):
            index = np.arange(len(row))
            kept = (bits > largest_of.threshold) | ((bits == largest_of.threshold) & (index < largest_of.cut))
            assert np.array_equal(kept, kept_by_sorting(row, count))


def test_equal_entries_beside_the_pivots_are_cut_in_the_right_block() -> None:
    """A chunk collects the entries of all its blocks together, so those of each block are counted once more."""
    x = torch.tensor([[5.0, 1, 3, 3, 0, 3, 3, 3, 2, 3, 3, 1]])
    blocks, key = blocks_of(x.to(DEVICE), 4, stand_in(), at_once=2), (0, 0)
    pivots = magnitude_bits(torch.tensor([4.0, 2.5])).tolist()
    for rank in range(2, 9):  # of the threes
        found = blocks.reduce(selection.Bracket({key: pivots}, x.shape[1]))[key].at(pivots, rank)
        assert (found.bits, found.ordinal, found.equal) == (magnitude_bits(x[0, 2:3]).item(), rank - 1, 7)
        cuts: Any = run_solve(selection.cuts({key: found}, exact=True), blocks.reduce)  # type: ignore[arg-type]
        assert int((x[0, : cuts[key]] == 3).sum()) == rank - 1


# ------------------------------------------------------------------ sums


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(
    ("count", "size"), [(0, 7), (1, 7), (LANES + 1, LANES), (3 * LANES, 2 * LANES), (20_000, 6_001)]
)
def test_sums_are_those_of_exact_arithmetic_within_rounding(kind: str, count: int, size: int) -> None:
    x = values_of(kind, (count,))
    found = sums([x.to(DEVICE)], size, native=False)[:, 0].tolist()
    parts = [x[first : first + size].double() for first in range(0, count, size)]
    for value, part in zip(found, parts, strict=True):
        bound = 2.0**-52 * (len(part) / LANES + 13) * math.fsum(part.abs().tolist())
        assert abs(value - math.fsum(part.tolist())) <= bound


INPUTS = [(2, 0, 4), (1, 3, 3), (2, 9001, 4500), (3, 5000, 5000)]  # how many, of how many elements, in such blocks
GRAMS = cases(INPUTS, DTYPE_AND_BASE, [False, True], needs=triton_if_native)


@pytest.mark.parametrize(("inputs", "dtype_and_base", "native"), GRAMS)
def test_grams_are_those_of_exact_arithmetic_within_rounding(
    inputs: tuple[int, int, int], dtype_and_base: tuple[torch.dtype, bool], native: bool
) -> None:
    (n, count, size), (dtype, based) = inputs, dtype_and_base
    rows = list(values_of("normal", (n, count), dtype))
    base = values_of("few", (count,), dtype) if based else None
    found = grams(chunk_of(rows, size, base=base, native=native)).cpu()
    wide = [x.double() if dtype == torch.float64 else x.float() for x in rows]
    deltas = [x if base is None else x - base.to(x.dtype) for x in wide]
    for block, first in enumerate(range(0, count, size)):
        parts = [x[first : first + size].double() for x in deltas]
        for i in range(n):
            for j in range(n):
                terms = (parts[i] * parts[j]).tolist()
                bound = 2.0**-51 * (size / LANES + 14) * math.fsum(map(abs, terms))
                assert abs(float(found[block, i, j]) - math.fsum(terms)) <= bound
    assert torch.equal(found, found.mT)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_a_kernels_sums_have_the_bits_of_the_formula(dtype: torch.dtype) -> None:
    """Of five inputs, whose fifteen products take two kernels; the last block is shorter."""
    rows, base = list(values_of("normal", (5, 5001), dtype)), values_of("few", (5001,), dtype)
    native, plain = (grams(chunk_of(rows, 4500, base=base, native=native)) for native in (True, False))
    assert torch.equal(native.view(torch.int64), plain.view(torch.int64))
    there = [x.float().to(DEVICE) for x in rows]
    native, plain = (sums(there, 4500, native) for native in (True, False))
    assert torch.equal(native.view(torch.int64), plain.view(torch.int64))


def test_sums_do_not_depend_on_the_chunk() -> None:
    rows = list(values_of("normal", (2, 40_000)))
    whole = grams(chunk_of(rows, 5000))
    for first in range(0, 40_000, 10_000):
        part = grams(chunk_of([x[first : first + 10_000] for x in rows], 5000))
        assert torch.equal(part, whole[first // 5000 : first // 5000 + 2])


def test_masks_of_both_kinds_are_made_on_the_device() -> None:
    """At a cut every element has its own limit."""
    for mask in (RANKS, COINS):
        with DEVICE:
            tensors: list[torch.Tensor] = []
            take_apart(mask.at(BLOCK, BLOCK, torch.float32), tensors)
        assert all(x.device.type == DEVICE.type for x in tensors)
