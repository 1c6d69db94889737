"""Compiled elementwise functions give the bits of the eager ones. Slow: each is compiled once, in about 10 s."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lfm.kernels import compiled as fused
from mergekit_lfm.kernels.compiled import Kernels
from mergekit_lfm.kernels.inductor import at_once
from mergekit_lfm.kernels.random import Coins, LocalMasks
from mergekit_lfm.kernels.ranks import NONE, Largest, Ranks
from mergekit_lfm.kernels.reductions import magnitudes
from mergekit_lfm.kernels.step import Step, put_together, run_eagerly, take_apart
from mergekit_lfm.kernels.sums import Spread, Weights, weighted_sum
from mergekit_lfm.methods import arcee_fusion, fisher, nearswap, pcb, ram, sce, votes
from mergekit_lfm.methods.task_vectors import SparseSum, apply

BLOCK = 4096
RANKS = Ranks([(Largest(0x3C500000, 1 << 40), Largest(0x3D000000, 0)), (Largest(0x3C000000, 0), NONE), (NONE, NONE)])
COINS = Coins((1, 2**63 + 5, 7), (0.3, 0.7, 1.0))
IMPORTANCE = arcee_fusion.Importance(torch.linspace(0, 1, 16 * BLOCK, dtype=torch.float64), 1, 4e-3)
SELECTION = sce.Selection(Ranks([(Largest(0x3F50000000000000, 0), NONE)]), (0.5, 0.2, 0.3), 0.7)


class EveryThird:
    """Masks that are known, of three inputs, as coins that depend on ranks become."""

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalMasks:  # noqa: ARG002
        return LocalMasks(-(torch.arange(start, start + 3 * count).reshape(3, count) % 3 == 0).int())


THIRDS: Any = EveryThird()
FUNCTIONS: dict[str, tuple[Any, Any, torch.dtype | None]] = {
    "weighted sum": (weighted_sum, Weights((0.3, 0.3, 0.4)), torch.bfloat16),
    "ties": (apply, SparseSum((0.5, -0.25, 1.0), RANKS, (0.5, -0.25, 1.0), True, 0.7), torch.bfloat16),
    "global ties": (apply, SparseSum((0.5, 0.25, 1.0), RANKS, (0.5, 0.25, 1.0), False, 1.0, False), torch.float16),
    "dare": (apply, SparseSum((0.5, 0.25, 1.0), COINS, None, False, 1.0), torch.float32),
    "dare ties": (apply, SparseSum((0.5, 0.25, 1.0), COINS, (0.5, 0.25, 1.0), True, 1.0), torch.bfloat16),
    "della": (apply, SparseSum((0.5, 0.25, 1.0), THIRDS, (0.5, 0.25, 1.0), True, 0.7), torch.bfloat16),
    "magnitudes": (magnitudes, COINS, None),
    "magnitudes in della": (magnitudes, THIRDS, None),
    "sce": (sce.apply, SELECTION, torch.float16),
    "ram": (ram.apply, Weights((0.7, 1e-3, 0.01, 0.02, 0.0)), torch.bfloat16),
    "magmax": (votes.keep_largest, Weights((0.5,)), torch.bfloat16),
    "consensus": (votes.keep_shared, Weights((0.5, 1.0, 0.4, 0.2, 0.6)), torch.bfloat16),
    "negmerge": (votes.keep_unanimous, Weights((-0.3,)), torch.float32),
    "pcb": (pcb.apply, pcb.Balance([0.0] * 3, [0.02] * 3, [1e-5] * 3, [4e-4] * 3, 1.2), torch.bfloat16),
    "nearswap": (nearswap.apply, Weights((5e-3,)), torch.bfloat16),
    "arcee fusion": (arcee_fusion.apply, IMPORTANCE, torch.bfloat16),
    "fisher": (fisher.apply, fisher.FisherAverage([0.5, 1.0, 0.25], [0.0] * 3, [0.3, 0.5, 0.2]), torch.bfloat16),
}
BY_ROW = {  # weights of blocks of whole rows
    "rows": (weighted_sum, Spread(torch.linspace(0, 1, 24 * BLOCK).double().reshape(-1, 3), 64), torch.bfloat16),
}
NEVER = {"arcee fusion"}  # its coefficients are as large as blocks
ALIKE = {"dare", "global ties", "magnitudes"}  # others have their operations
SKIPPED = NEVER if "LONG_TESTS" in os.environ else NEVER | ALIKE
COMPILED = [name for name in FUNCTIONS | BY_ROW if name not in SKIPPED]


def stored_block(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Three inputs and a base, with equal entries, zeros of both signs and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(BLOCK, generator=generator) * 0.02
    inputs = [base + torch.randn(BLOCK, generator=generator) * 0.01 for _ in range(3)]
    for x in inputs:
        x[:64] = base[:64]
        x[64:128], base[64:128] = -0.0, 0.0
        x[128:160] = base[128:160] + 1e-41
        x[160:192] = base[160:192] = -0.0
        x[192:224] = x[192:224] * 1e-38
        base[192:224] = base[192:224] * 1e-38
    return tuple(x.to(dtype) for x in inputs), base.to(dtype)


def inputs_of(name: str, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Inputs and a base for one of the functions; for some two inputs, or with a statistic of each, some of them 0."""
    inputs, base = stored_block(dtype)
    if name == "fisher":
        return (*inputs, *(x.float() ** 2 for x in inputs)), None
    return (inputs[:2], None) if name in ("nearswap", "arcee fusion") else (inputs, base)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mergekit_lfm" / "kernels"


def bits(result: Any) -> list[torch.Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [tensor.view(torch.uint8) for tensor in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_eager_bit_for_bit(name: str, own_cache: Path) -> None:
    function, coefficients, out = (FUNCTIONS | BY_ROW)[name]
    dtype = torch.float32 if name == "dare" else torch.bfloat16
    stored, base = inputs_of(name, dtype)
    local = coefficients.at(BLOCK, BLOCK, torch.float32)
    kernels = Kernels("always", 1, BLOCK, threads=2)
    compiled = kernels(Step(function, stored, base, local, torch.float32, out))
    assert not kernels.problems and len(list(own_cache.glob("*.so"))) == 1
    eager = run_eagerly(Step(function, stored, base, local, torch.float32, out))
    assert all(torch.equal(a, b) for a, b in zip(bits(compiled), bits(eager), strict=True))
    other = Kernels("auto", 0, BLOCK, threads=1)  # a later process finds it in the cache, whatever the coefficients
    again = coefficients.at(7 * BLOCK, BLOCK, torch.float32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            bits(other(Step(function, stored, base, again, torch.float32, out))),
            bits(run_eagerly(Step(function, stored, base, again, torch.float32, out))),
            strict=True,
        )
    )
    assert next(iter(other._kernels.values())) is not None
    lengths = () if name in BY_ROW else (BLOCK - 1, BLOCK // 4 + 1, BLOCK // 4)
    for count in lengths:  # as parts of a whole block, by the same library; the last one eagerly
        local = coefficients.at(0, count, torch.float32)
        rows, below = tuple(x[:count] for x in stored), None if base is None else base[:count]
        short = Step(function, rows, below, local, torch.float32, out)
        assert all(map(torch.equal, bits(kernels(short)), bits(run_eagerly(short))))
    assert len(kernels._kernels) == 1 and not kernels.problems


def test_nothing_is_compiled_that_does_not_pay(own_cache: Path) -> None:
    stored, base = stored_block(torch.bfloat16)
    local = Weights((1.0, 1.0, 1.0)).at(0, BLOCK, torch.float32)
    for kernels in (Kernels("auto", 1, BLOCK, 1), Kernels("never", 10**9, BLOCK, 1)):
        kernels(Step(weighted_sum, stored, base, local, torch.float32, torch.bfloat16))
    assert not own_cache.exists()


@pytest.mark.usefixtures("own_cache")
def test_a_failed_compilation_is_reported_and_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "raise SystemExit('no compiler here')"]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    monkeypatch.setattr(fused.Fused, "start_compiling", fails)
    stored, base = stored_block(torch.bfloat16)
    local = Weights((1.0, 1.0, 1.0)).at(0, BLOCK, torch.float32)
    kernels = Kernels("always", 1, BLOCK, 1)
    result = kernels(Step(weighted_sum, stored, base, local, torch.float32, torch.bfloat16))
    eager = run_eagerly(Step(weighted_sum, stored, base, local, torch.float32, torch.bfloat16))
    assert torch.equal(result, eager)
    assert kernels.problems == {"weighted_sum runs without being compiled: no compiler here"}


@pytest.mark.slow
def test_compiled_code_lets_other_threads_run(own_cache: Path) -> None:  # noqa: ARG001
    """Python's lock, which a thread keeps for longer than the test takes, is free while a library runs."""
    kernels, gate, ran = Kernels("always", 1, BLOCK, threads=1), threading.Lock(), list[bool]()
    gate.acquire()
    other = threading.Thread(target=lambda: ran.append(gate.acquire()))
    kernels(a_sum())
    (library,) = kernels._kernels.values()
    assert library is not None
    stored, base = stored_block(torch.bfloat16)
    tensors = (*stored, base, Weights((1.0, 1.0, 1.0)).at(0, BLOCK, torch.float32))
    interval = sys.getswitchinterval()
    other.start()
    try:
        sys.setswitchinterval(1000)
        gate.release()
        for _ in range(10_000):
            ran or library(*tensors)
        assert ran == [True]
    finally:
        sys.setswitchinterval(interval)
        other.join()


def compile_nothing(step: fused.Fused, folder: Path) -> subprocess.Popen[bytes]:
    """In place of compiling: a library of a few bytes, with its digest in its name."""
    content = b"compiled here"
    (folder / f"{step.name}.{hashlib.sha256(content).hexdigest()}.so").write_bytes(content)
    return subprocess.Popen(["true"], stderr=subprocess.PIPE)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bytes]]:
    """The libraries that are loaded, with their contents; each runs eagerly. Nothing is compiled."""
    libraries: list[tuple[Path, bytes]] = []

    def load(step: fused.Fused, library: Path, _: int) -> Any:
        libraries.append((library, library.read_bytes()))
        return step

    monkeypatch.setattr(fused.Fused, "load", load)
    monkeypatch.setattr(fused.Fused, "start_compiling", compile_nothing)
    return libraries


def a_sum() -> Step:
    stored, base = stored_block(torch.bfloat16)
    return Step(weighted_sum, stored, base, Weights((1.0, 1.0, 1.0)).at(0, BLOCK, torch.float32), torch.float32, None)


def run_twice() -> Kernels:
    """Two processes that run the same function: the second finds the library of the first."""
    for _ in range(2):
        with Kernels("always", 1, BLOCK, 1) as kernels:
            kernels(a_sum())
            kernels(a_sum())
    return kernels


def test_a_library_is_loaded_from_a_private_folder(own_cache: Path, loaded: list[tuple[Path, bytes]]) -> None:
    assert run_twice().problems == set()
    (library,) = own_cache.glob("*.so")
    assert loaded == [(library, b"compiled here")] * 2
    assert own_cache.stat().st_mode & 0o777 == 0o700


def test_a_shorter_block_is_lengthened_for_a_library(loaded: list[tuple[Path, bytes]]) -> None:
    """Its inputs and what its coefficients have for every element; results are cut, one or several."""
    stored, base = stored_block(torch.bfloat16)
    with Kernels("always", 1, BLOCK, 1) as kernels:
        for name in ("della", "magnitudes in della"):
            function, coefficients, out = FUNCTIONS[name]
            for count in (BLOCK, BLOCK - 1, BLOCK // 4 + 1, BLOCK // 4):
                local = coefficients.at(0, count, torch.float32)
                step = Step(function, tuple(x[:count] for x in stored), base[:count], local, torch.float32, out)
                assert all(map(torch.equal, bits(kernels(step)), bits(run_eagerly(step))))
    assert len(loaded) == 2


def make_writable(folder: Path) -> None:
    folder.chmod(0o770)


def make_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize(("spoil", "reason"), [(make_writable, "others may write there"), (make_link, "it is a link")])
def test_no_library_is_loaded_from_a_folder_of_others(
    spoil: Callable[[Path], None], reason: str, own_cache: Path, loaded: list[tuple[Path, bytes]]
) -> None:
    run_twice()
    spoil(own_cache)
    loaded.clear()
    kernels = run_twice()
    places = {library.parent for library, _ in loaded}
    assert len(loaded) == 2 and own_cache not in places and not any(place.exists() for place in places)
    assert kernels.problems == {
        f"the compiled code in {own_cache} is not used: {reason}. This run compiles its own; remove the folder, "
        "or make it yours alone (chown, chmod 700)"
    }


def test_a_changed_function_of_another_package_has_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "merge_of_somebody.py"
    source.write_text("def apply(rows, base, local): return rows[0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    step = fused.Fused(import_module(source.stem).apply, (), torch.float32, None)
    before = step.name
    assert step.name == before
    source.write_text("def apply(rows, base, local): return rows[1]\n")
    fused._environment.cache_clear()
    assert step.name != before


def test_a_changed_library_is_compiled_anew(own_cache: Path, loaded: list[tuple[Path, bytes]]) -> None:
    run_twice()
    (library,) = own_cache.glob("*.so")
    library.write_bytes(b"foreign code")
    with Kernels("always", 1, BLOCK, 1) as kernels:
        kernels(a_sum())
    assert [content for _, content in loaded] == [b"compiled here"] * 3
    assert kernels.problems == {f"{library} was changed after it was compiled, and is not used; it was removed"}


def test_a_library_that_others_may_write_is_compiled_anew(own_cache: Path, loaded: list[tuple[Path, bytes]]) -> None:
    run_twice()
    (library,) = own_cache.glob("*.so")
    library.chmod(0o666)
    with Kernels("always", 1, BLOCK, 1) as kernels:
        kernels(a_sum())
    assert len(loaded) == 3 and kernels.problems
    assert library.stat().st_mode & 0o022 == 0


@pytest.mark.slow
def test_the_merge_goes_on_while_something_is_compiled(own_cache: Path) -> None:
    """Eager results before, compiled results after, with the same bits; a damaged library is compiled anew."""
    function, coefficients, out = FUNCTIONS["dare ties"]
    stored, base = stored_block(torch.bfloat16)
    local = coefficients.at(0, BLOCK, torch.float32)
    eager = run_eagerly(Step(function, stored, base, local, torch.float32, out))
    for _ in range(2):
        with Kernels("auto", 1, BLOCK, threads=2, compile_s=0) as kernels:
            calls = 0
            while not any(kernels._kernels.values()):
                assert torch.equal(kernels(Step(function, stored, base, local, torch.float32, out)), eager)
                calls += 1
                time.sleep(0.01)
            assert torch.equal(kernels(Step(function, stored, base, local, torch.float32, out)), eager)
            assert calls > 1 and not kernels.problems
        (library,) = own_cache.glob("*.so")
        damaged = library.read_bytes()[:1000]
        library.unlink()  # this process has the first one in its memory still
        library.write_bytes(damaged)
        with Kernels("auto", 1, BLOCK, threads=2, compile_s=0) as kernels:
            assert torch.equal(kernels(Step(function, stored, base, local, torch.float32, out)), eager)
            assert kernels.problems and not library.exists()


@pytest.mark.usefixtures("own_cache")
def test_unfinished_compilations_are_ended() -> None:
    stored, base = stored_block(torch.bfloat16)
    local = Weights((1.0, 1.0, 1.0)).at(0, BLOCK, torch.float32)
    with Kernels("auto", 1, BLOCK, threads=1, compile_s=0) as kernels:
        kernels(Step(weighted_sum, stored, base, local, torch.float32, torch.bfloat16))
        (process,) = kernels._compiling.values()
        assert process.poll() is None
    assert process.poll() is not None


def test_loads_are_of_one_instruction_where_inductor_copies() -> None:
    """Lines of a kernel for AVX2: others than those of eight integers or numbers of 16 bits stay."""
    place = "in_ptr0 + static_cast<int64_t>(524288L + x0)"
    load = "at::vec::Vectorized<{}>::loadu({}, static_cast<int64_t>({}))".format
    for kind in ("at::BFloat16", "at::Half"):
        half = f"_mm_loadu_si128(reinterpret_cast<const __m128i*>({place}))"
        assert at_once(load(kind, place, 8)) == f"at::vec::Vectorized<{kind}>(_mm256_zextsi128_si256({half}))"
    assert at_once(load("int32_t", place, "8L")) == f"at::vec::Vectorized<int32_t>::loadu({place})"
    for line in (load("float", place, 8), load("at::BFloat16", place, 5), load("int32_t", place, 16), f"f({place})"):
        assert at_once(line) == line


def test_taking_apart_and_putting_together() -> None:
    value = (torch.ones(2), None, COINS.at(0, 4, torch.float32), (True, torch.zeros(1)))
    tensors: list[torch.Tensor] = []
    form = take_apart(value, tensors)
    assert len(tensors) == 4 and hash(form) == hash(take_apart(value, []))
    again = put_together(form, iter(tensors))
    assert type(again[2]) is type(value[2]) and again[1] is None and again[3][0] is True
    assert again[2].keys is tensors[1]
