"""Many small tensors: merged at once, with the bytes that each has alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_methods import CASES, DELTAS, ids, parameters_of, save_statistics
from helpers_processes import on
from models import output_of
from safetensors.torch import load_file, save_file

from mergekit_lfm.api.contract import count_inputs
from mergekit_lfm.engine.batches import split_batches
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.engine.tasks import BatchTask, Executor, MergeTask, Task
from mergekit_lfm.engine.threads import thread_pool
from mergekit_lfm.engine.worker import Worker
from mergekit_lfm.errors import FormatError
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output import shards
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store import formats


def list_shapes(count: int = 60) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names in layers, vectors and matrices of 1 to 70 elements, of several dtypes; and an empty one."""
    for i in range(count):
        dtype = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64)[i % 4]
        yield f"layers.{i // 20}.part{i % 20}.w", ((i % 7 + 1, i % 10 + 1) if i % 3 else (i % 17 + 1,)), dtype
    yield "empty", (0, 3), torch.float32


def save_small(folder: Path, seed: int) -> Path:
    """A model of small tensors; those of one kind lie side by side."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=draw).round(decimals=1).to(dtype) for name, shape, dtype in list_shapes()
    }
    tensors["count"] = torch.arange(5)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def plan_small(case: tuple[str, dict[str, Any]], folder: Path) -> Plan:
    name, extra = case
    saved = [save_small(folder / f"m{i}", i) for i in range(1 + count_inputs(name))]
    models: list[dict[str, Any]] = [{"model": str(path)} for path in saved[1:]]
    if kind := METHODS[name].statistics:
        for model in models:
            model["stats"] = str(save_statistics(Path(model["model"]), kind))
    recipe: dict[str, Any] = {"merge_method": name, "models": models, "parameters": parameters_of(name, extra)}
    if METHODS[name].base != "member":
        recipe["base_model"] = str(saved[0] if name in DELTAS else saved[1])
    return make_plan(Recipe.parse(recipe))


@contextmanager
def one_by_one(worker: Worker, count: int) -> Iterator[Executor]:
    """Threads that do each small tensor by itself."""

    def split(tasks: Iterable[Task]) -> Iterator[Task]:
        for task in tasks:
            yield from (MergeTask(i, (0,), solve=True) for i in task.jobs) if isinstance(task, BatchTask) else [task]

    with thread_pool(worker, count) as executor:
        yield lambda tasks: executor(split(tasks))


def is_solved_by_tensor(case: tuple[str, dict[str, Any]]) -> bool:
    """False for matrices, and for one solve over the whole model, which needs tensors of one dtype."""
    method = METHODS[case[0]]
    shared = {parameter.name: parameter.default for parameter in method.parameters} | case[1]
    return method.whole is None and method.scope(shared) == "tensor"


ELEMENTWISE = [case for case in CASES if is_solved_by_tensor(case)]
LINEAR = ("linear", {"weight": 0.25})


@pytest.mark.parametrize("case", ELEMENTWISE, ids=ids)
def test_small_tensors_have_the_bytes_of_each_alone(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    plan = plan_small(case, tmp_path)
    execute(plan, tmp_path / "at-once", threads=1)
    execute(plan, tmp_path / "alone", threads=1, engine=on(one_by_one))
    assert output_of(tmp_path / "at-once") == output_of(tmp_path / "alone")


def test_small_tensors_of_a_file_are_read_and_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_small(LINEAR, tmp_path)
    calls = list[str]()

    def count(module: Any, name: str) -> None:
        call = getattr(module, name)

        def counted(*arguments: Any) -> None:
            calls.append(name)
            call(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(formats, "read_exactly")
    count(shards, "write_exactly")
    execute(plan, tmp_path / "out", threads=1)
    assert len(plan.tensors) == 62
    assert calls.count("read_exactly") < 20 and calls.count("write_exactly") < 10


def test_a_batch_with_nan_names_the_tensor(tmp_path: Path) -> None:
    plan = plan_small(LINEAR, tmp_path)
    path = tmp_path / "m2" / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.1.part3.w"].view(-1)[0] = torch.nan
    save_file(tensors, path)
    plan = make_plan(plan.recipe)
    with pytest.raises(FormatError, match=r"layers\.1\.part3\.w of .*m2 holds NaN"):
        execute(plan, tmp_path / "refused", threads=1)
    found = execute(plan, tmp_path / "at-once", threads=1, nan="warn").findings
    assert len(found) == 1 and found[0].startswith("layers.1.part3.w of ")
    execute(plan, tmp_path / "alone", threads=1, nan="warn", engine=on(one_by_one))
    assert output_of(tmp_path / "at-once") == output_of(tmp_path / "alone")


def test_batches_fit_the_share_of_a_worker(tmp_path: Path) -> None:
    budget = Budget(plan_small(LINEAR, tmp_path))
    small = [i for i, job in enumerate(budget.plan.tensors) if job.small]
    (whole,) = split_batches(budget, small, 1 << 30)
    assert list(whole) == small
    for share in (100, 3000, 20_000):
        batches = list(split_batches(budget, small, share))
        assert [i for batch in batches for i in batch] == small
        held = [sum(budget.scratch(budget.plan.tensors[i]) for i in batch) for batch in batches]
        assert all(nbytes <= share or len(batch) == 1 for nbytes, batch in zip(held, batches, strict=True))
    assert budget.peak(1 << 30, 1) >= sum(budget.scratch(budget.plan.tensors[i]) for i in small)
