"""The contract of every merge method, as functions that raise AssertionError: for the tests of methods of your own.

    import pytest
    from mergekit_lfm.api.contract import CHECKS

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_method(check):
        check("my_method", {"strength": 0.3})

A check that does not apply to a method, such as that of its seed to one that is not random, passes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_lfm.api.tensors import merge_tensors
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

Parameters = Mapping[str, Any]
Check = Callable[[str, Parameters], None]

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
ODD_SHAPES: tuple[tuple[int, ...], ...] = ((7,), (1,), (3, 1), (), (0, 5), (2, 3, 5))
BLOCK = 256  # elements of a block in `check_passes`, so that small tensors have several


def count_inputs(name: str) -> int:
    """The number of inputs to try the method on: three, if it takes so many."""
    least, most = METHODS[name].inputs
    return most or max(least, 3)


def make_inputs(name: str, shape: tuple[int, ...] = (12, 20), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments for `merge_tensors`: fine-tunes of one base, and statistics if the method takes them."""
    method, generator = METHODS[name], torch.Generator().manual_seed(11)
    base = torch.randn(shape, generator=generator)
    tunes = [(base + 0.05 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count_inputs(name))]
    if method.base == "first":
        return {"tensors": tunes[1:], "base": tunes[0]}
    given = {"tensors": tunes, "base": None if method.base == "member" else base.to(dtype)}
    if method.statistics == "gram":
        examples = [torch.randn(5, shape[-1], generator=generator) for _ in tunes]
        given["statistics"] = [x.T @ x / len(x) for x in examples]
    elif method.statistics:
        given["statistics"] = [torch.randn(shape, generator=generator) ** 2 for _ in tunes]
    return given


def check_shapes(name: str, parameters: Parameters) -> None:
    """Every dtype and shape goes through, the result is finite, and no input changes."""
    cases: list[tuple[tuple[int, ...], torch.dtype]] = [((12, 20), dtype) for dtype in FLOATS]
    if METHODS[name].statistics != "gram":
        cases += [(shape, torch.bfloat16) for shape in ODD_SHAPES]
    for shape, dtype in cases:
        given = make_inputs(name, shape, dtype)
        tensors = [x for x in [*given["tensors"], given["base"], *given.get("statistics", [])] if x is not None]
        before = [x.clone() for x in tensors]
        found = merge_tensors(name, **given, **parameters)
        assert found.shape == shape and found.dtype == dtype, f"{dtype} {shape} became {found.dtype} {found.shape}"
        assert bool(found.isfinite().all()), f"{dtype} {shape} gives NaN or infinity"
        assert all(map(torch.equal, tensors, before)), f"{dtype} {shape}: an input was changed"


def check_identity(name: str, parameters: Parameters) -> None:
    """Equal inputs give themselves; deltas of zero give the base, bit for bit."""
    given = make_inputs(name)
    same = given["tensors"][0]
    given["tensors"] = [same.clone() for _ in given["tensors"]]
    given["base"] = None if given["base"] is None else same.clone()
    found = merge_tensors(name, **given, **parameters)
    assert torch.allclose(found, same, rtol=1e-6), "inputs that are all equal are changed"
    if METHODS[name].base in ("required", "optional"):
        assert torch.equal(found, same), "deltas of zero change the base"


def check_scale(name: str, parameters: Parameters) -> None:
    """Models that are larger by a factor give a result larger by it: a size that is compared with a constant shows.

    A power of two goes through bit for bit. Parameters declared as `absolute` grow with the models.
    """
    if not METHODS[name].homogeneous:
        return
    for dtype in FLOATS:
        given = make_inputs(name, dtype=dtype)
        plain = merge_tensors(name, **given, **parameters)
        for factor in (2.0**-40, 2.0**-20, 2.0**20, 2.0**40):
            found = merge_tensors(name, **_scaled(given, factor), **_scaled_parameters(name, parameters, factor))
            assert torch.equal(found, plain * factor), f"{dtype}, inputs times {factor}"
    largest = float(plain.abs().max())
    for factor in (1e-6, 1e6):
        found = merge_tensors(name, **_scaled(given, factor), **_scaled_parameters(name, parameters, factor))
        assert torch.allclose(found / factor, plain, rtol=0, atol=1e-12 * largest), f"inputs times {factor}"


def _scaled(given: dict[str, Any], factor: float) -> dict[str, Any]:
    base = None if given["base"] is None else given["base"] * factor
    return given | {"tensors": [x * factor for x in given["tensors"]], "base": base}


def _scaled_parameters(name: str, parameters: Parameters, factor: float) -> dict[str, Any]:
    absolute = {p.name: p.default for p in METHODS[name].parameters if p.absolute}
    values = {**absolute, **parameters}
    return {key: value * factor if key in absolute else value for key, value in values.items()}


def check_order(name: str, parameters: Parameters) -> None:
    """The order of the inputs does not matter, within rounding."""
    method = METHODS[name]
    if method.random or method.base == "first" or any(isinstance(value, list) for value in parameters.values()):
        return
    given = make_inputs(name)
    turned = {key: value[::-1] if isinstance(value, list) else value for key, value in given.items()}
    one, other = (merge_tensors(name, **each, **parameters) for each in (given, turned))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), "the order of the inputs matters"


def check_seed(name: str, parameters: Parameters) -> None:
    """A random method's result depends on the seed and the tensor's name, and on nothing else."""
    given = make_inputs(name)
    one, same, reseeded, renamed = (
        merge_tensors(name, **given, **parameters, seed=seed, name=tensor)
        for seed, tensor in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    )
    assert torch.equal(one, same), "the same seed gives another result"
    if METHODS[name].random:
        assert not torch.equal(one, reseeded), "another seed gives the same result"
        assert not torch.equal(one, renamed), "a tensor of another name has the same random numbers"


def check_passes(name: str, parameters: Parameters) -> None:
    """A model that is read several times in pieces gives the bytes of one that is read once. Not with statistics."""
    if METHODS[name].statistics:
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for i in range(4):
            save_model(folder / f"m{i}", i)
        recipe: dict[str, Any] = {"merge_method": name, "parameters": dict(parameters)}
        recipe["models"] = [{"model": str(folder / f"m{i + 1}")} for i in range(count_inputs(name))]
        if METHODS[name].base != "member":
            recipe["base_model"] = str(folder / ("m1" if METHODS[name].base == "first" else "m0"))
        compare_passes(make_plan(Recipe.parse(recipe), block=BLOCK), folder)


def save_model(folder: Path, offset: int, big: tuple[int, int] = (300, 160)) -> None:
    """Tensors of many sizes: less than a block of 256, several blocks, several segments."""
    from safetensors.torch import save_file

    shapes = {"big": big, "model.layers.0.w": (64, 48), "model.layers.1.w": (64, 48), "norm": (33,), "empty": (0,)}
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(offset)
    tensors = {
        name: (x + 0.05 * offset * torch.randn(x.shape, generator=generator)).bfloat16() for name, x in base.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")


def least_memory(plan: Plan, *, in_parts: bool = True) -> int:
    """Bytes with which one worker can carry the plan out. in_parts: on the processor."""
    budget = Budget(plan, in_parts)
    return max([*(budget.least(job) for job in plan.tensors), *(group.nbytes for group in plan.matrices)])


def compare_passes(plan: Plan, folder: Path) -> None:
    """Carry the plan out, once with room for all and once with little, and compare the files. folder: for them."""
    files = []
    for threads, memory in ((1, 1 << 30), (3, 3 * least_memory(plan))):
        out = folder / f"{threads}-threads" / "merged"  # of one name, because the card has it
        execute(plan, out, memory=memory, threads=threads)
        files.append({path.name: path.read_bytes() for path in out.iterdir() if path.is_file()})
    assert files[0] == files[1], "reading in several passes gives other bytes"


CHECKS: tuple[Check, ...] = (check_shapes, check_identity, check_scale, check_order, check_seed, check_passes)
