"""Alignment on a GPU gives the CPU's result. On a pretended GPU, and on a real one if present."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llama import base_tensors, save
from helpers_align import convolutions, loaded, mlp, mlp_table, texts
from helpers_commands import refusal, run
from helpers_device import GPU, HEAVY, on_cpu, one_after_another, pretended_gpu
from torch import Tensor

from mergekit_lfm.align import find
from mergekit_lfm.align.find import find_transform
from mergekit_lfm.align.pair import ON_A_GPU, one_thread_each
from mergekit_lfm.api import prepare as stages
from mergekit_lfm.api.prepare import note_device, prepare
from mergekit_lfm.artifacts import cache
from mergekit_lfm.artifacts.transform import Transform, UnitsElement
from mergekit_lfm.collect.run import collect
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.views.maps import CPU

WIDTHS, WIDER = (12, 20, 16, 5), (12, 24, 16, 5)
FEW = {"restarts": 2, "sweeps": 3}
FEWER: dict[str, Any] = {"restarts": 1, "sweeps": 1}

Given = dict[str, Any]


def perceptrons(dtype: torch.dtype) -> Given:
    a, b = (mlp(WIDTHS, seed, dtype=dtype) for seed in range(2))
    return {"source": b, "to": a, "symmetries": mlp_table(WIDTHS)}


def other_widths() -> Given:
    tables = {"symmetries": mlp_table(WIDER), "symmetries_to": mlp_table(WIDTHS)}
    return {"source": mlp(WIDER, 1), "to": mlp(WIDTHS, 0), **tables}


def images() -> Given:
    (b, symmetries), (a, _) = convolutions(1), convolutions(0)
    return {"source": b.state_dict(), "to": a.state_dict(), "symmetries": symmetries}


def saved(kind: str, place: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Given:
    pytest.importorskip("transformers")
    a, b = (loaded(kind, seed, place / str(seed), dtype, **options) for seed in range(2))
    return {"source": b, "to": a}


def with_statistics(place: Path) -> Given:
    given = saved("llama", place)
    a, b = given["to"].path, given["source"].path
    return {**given, "statistics": collect("cross", a, texts(), place / "cross", other=b, task="lm")}


def from_a_rotation(place: Path) -> Given:
    given = saved("llama", place)
    return {**given, "initial": find_transform(**given, method="rotation", sweeps=1)}


BF16 = torch.bfloat16
CASES: dict[str, tuple[str, Callable[[Path], Given], Given]] = {
    "weights": ("weight_matching", lambda _: perceptrons(torch.float64), FEW),
    "weights of float32": ("weight_matching", lambda _: perceptrons(torch.float32), FEW | {"normalise": True}),
    "weights of convolutions": ("weight_matching", lambda _: images(), FEW),
    "weights of a GPT-2": ("weight_matching", lambda place: saved("gpt2", place), FEWER),
    "activations": ("activation_matching", with_statistics, {}),
    "exact transport": ("ot", lambda _: perceptrons(torch.float32), {}),
    "exact transport of widths": ("ot", lambda _: other_widths(), {"cost": "cosine"}),
    "Sinkhorn": ("ot", lambda _: other_widths(), {"regularisation": 0.1}),
    "Sinkhorn by activations": ("ot", with_statistics, {"regularisation": 0.1}),
    "rotation": ("rotation", lambda place: saved("llama", place), FEWER),
    "rotation of bfloat16": ("rotation", lambda place: saved("llama", place, BF16), FEWER),
    "rotation with signs": ("rotation", lambda place: saved("qwen3", place, tie_word_embeddings=True), FEWER),
    "rotation by activations": ("rotation", with_statistics, {}),
    "rotation from another": ("rotation", from_a_rotation, FEWER),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Two models, and how one is aligned to the other."""
    method, given, parameters = CASES[request.param]
    return {**given(tmp_path_factory.mktemp("case")), "method": method, **parameters}


@pytest.fixture(scope="module")
def expected(case: Given) -> Transform:
    """The transform found on the CPU."""
    return find_transform(**case)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU with the name "cuda"."""
    monkeypatch.setattr(find, "find_gpu", {"cpu": None, "cuda": GPU}.__getitem__)
    monkeypatch.setattr(find, "one_thread_each", one_after_another)


def tensors(transform: Transform) -> dict[str, Tensor]:
    """All tensors of a transform, and its gains."""
    parts = [*transform.elements.items(), *transform.gains.items()]
    return {f"{name} {part}": x for name, held in parts for part, x in vars(held).items() if x is not None}


def assert_agree(found: Transform, expected: Transform, *, to: float) -> None:
    """Assert equal permutations, and other numbers equal to a bound relative to the largest entry of each tensor."""
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys() and on_cpu(*ours.values())
    for name, x in theirs.items():
        if x.is_floating_point():
            assert float((ours[name] - x).abs().max()) <= to * float(x.abs().max()), name
        else:
            assert torch.equal(ours[name], x), name
    assert found.info.scores == pytest.approx(expected.info.scores, rel=max(to, 1e-12))
    assert found.info.options == {**expected.info.options, "device": found.info.options["device"]}
    assert "device" not in expected.info.options


@pytest.mark.usefixtures("pretended")
def test_a_gpu_finds_the_same_as_the_cpu(case: Given, expected: Transform) -> None:
    with pretended_gpu() as gpu:
        found = find_transform(**case, device="cuda")
    assert_agree(found, expected, to=0)
    assert gpu.there


@pytest.mark.usefixtures("pretended")
def test_the_cpu_is_the_default() -> None:
    with pretended_gpu() as gpu:
        found = [find_transform(**perceptrons(torch.float32), **FEW, **on) for on in ({}, {"device": "cpu"})]
    assert not gpu.there and found[0].info == found[1].info


# With sums in reverse the largest relative differences are 5e-16 and 2e-6, of polar factors of products in float32.
# Sinkhorn may end some steps earlier or later, with marginals that are right to 1e-10.
def bound(case: Given) -> float:
    dtypes = {x.dtype for x in case["source"].values()}
    return 1e-8 if dtypes == {torch.float64} else 1e-4


@pytest.mark.usefixtures("pretended")
def test_other_rounding_permutes_alike(case: Given, expected: Transform) -> None:
    with pretended_gpu(backwards=True):
        found = find_transform(**case, device="cuda")
    assert_agree(found, expected, to=bound(case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_real_gpu_agrees_within_rounding(case: Given, expected: Transform) -> None:
    assert_agree(find_transform(**case, device="cuda"), expected, to=bound(case))


@pytest.mark.usefixtures("pretended")
def test_large_products_are_computed_there(tmp_path: Path) -> None:
    given = saved("llama", tmp_path)
    with pretended_gpu() as gpu:
        find_transform(**given, method="rotation", **FEWER, device="cuda")
    assert gpu.there["mm"] and gpu.there["bmm"] and gpu.there["_linalg_svd"]
    assert HEAVY & set(gpu.here) == {"_linalg_svd", "mm"}  # blocks that act inside of heads
    with pretended_gpu() as gpu:
        find_transform(**perceptrons(torch.float32), **FEW, device="cuda")
    assert gpu.there["mm"] and not HEAVY & set(gpu.here)


def test_operations_that_mix_devices_are_refused_by_the_pretended_gpu() -> None:
    with pretended_gpu():
        x = torch.ones(3, device=GPU)
        assert float((x + torch.tensor(1.0)).sum()) == 6
        assert x[torch.tensor([0, 2])].device == GPU
        mixtures: list[Callable[[], Tensor]] = [
            lambda: x + torch.ones(3),
            lambda: torch.ones(3)[x.long()],
            lambda: torch.cat([x, torch.ones(3)]),
        ]
        for wrong in mixtures:
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
            x.numpy()


@pytest.mark.usefixtures("pretended")
def test_products_that_would_be_rounded_more_are_refused() -> None:
    given = perceptrons(torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(PlanError, match=r"torch is set to multiply float32 matrices as TF32, .*; expected all 24"):
            find_transform(**given, device="cuda")
        find_transform(**given)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("pretended")
def test_a_full_memory_is_one_message() -> None:
    def full(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines")

    with pretended_gpu(), pytest.raises(PlanError, match=r"the memory of meta is full \(OutOfMemoryError: CUDA out of"):
        find_transform(**perceptrons(torch.float32), device="cuda", progress=full)


def test_a_gpu_is_given_few_tensors_at_a_time() -> None:
    torch.set_num_threads(ON_A_GPU + 3)
    try:
        for device, most in ((CPU, ON_A_GPU + 3), (GPU, ON_A_GPU)):
            with one_thread_each(device) as in_order:
                begun: list[int] = []
                results = in_order(begun.append, range(20))
                next(iter(results))
                assert len(begun) <= most
                assert len(list(results)) == 19 and sorted(begun) == list(range(20))
            assert torch.get_num_threads() == ON_A_GPU + 3
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two Llamas, a and b, where the commands run."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, base_tensors(seed))
    return tmp_path


def test_the_command_names_the_device(models: Path) -> None:
    arguments = ["align", "b", "--to", "a", "--restarts", "1", "-o", "t.st"]
    message = refusal(run(*arguments, "--device", "cuda:99"))
    assert "the device 'cuda:99' cannot be used here" in message and "expected one like cpu, cuda, cuda:1" in message
    assert not (models / "t.st").exists()
    assert run(*arguments, "-q", "--device", "cpu").exit_code == 0
    result = run("align", "a", "--check", "--device", "cpu")
    assert result.exit_code == 2 and "leave out --device" in result.stderr
    help_text = " ".join(run("align", "--help").stdout.split())
    assert (
        "Where matrices are multiplied: cpu, cuda, cuda:1, or auto for a GPU if there is one. [default: cpu]"
        in help_text
    )


@pytest.fixture
def found(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The devices on which a recipe's alignments run, one after another; "cuda" is available."""
    asked: list[str] = []

    def align(*given: Any, device: str, **options: Any) -> Transform:
        asked.append(device)
        made = find_transform(*given, **options)
        shifted = {
            name: UnitsElement(element.order.roll(len(asked) % 2))
            for name, element in made.elements.items()
            if isinstance(element, UnitsElement) and element.order is not None
        }
        return dataclasses.replace(made, elements={**made.elements, **shifted})

    monkeypatch.setattr(cache, "find_device", torch.device)
    monkeypatch.setattr(stages, "find_transform", align)
    monkeypatch.setenv("XDG_CACHE_HOME", str(models / "cache"))
    yield asked


def test_a_recipe_never_uses_the_alignment_of_another_device(found: list[str]) -> None:
    entry = {"model": "b", "align": {"to": "a", "method": "weight_matching", "restarts": 1}}
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, entry], "parameters": {"weight": 1}}
    plan = make_plan(Recipe.parse(recipe))
    name = next(iter(plan.models[1]))
    digests, values = [], []
    for device in ("cpu", "cuda", "cpu", "cuda"):
        after = prepare(plan, Path("out"), device=device)
        assert not after.pending and after.digest == note_device(plan, device).digest
        digests.append(after.digest)
        values.append(after.models[1].read(name))
    assert found == ["cpu", "cuda"]
    assert digests[0] == digests[2] == plan.digest
    assert digests[1] == digests[3] != plan.digest
    assert torch.equal(values[0], values[2]) and torch.equal(values[1], values[3])
    assert not torch.equal(values[0], values[1])
    plain = make_plan(Recipe.parse({**recipe, "models": [{"model": "a"}, {"model": "b"}]}))
    assert note_device(plain, "cuda").digest == plain.digest
