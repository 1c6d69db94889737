"""The contract of every merge method in the registry, whatever its formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_methods import CASES, ids, parameters_of, plan_of
from helpers_processes import on
from models import output_of

from mergekit_lfm import merge_tensors
from mergekit_lfm.api import contract
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.engine.tasks import Executor
from mergekit_lfm.engine.threads import thread_pool
from mergekit_lfm.engine.worker import Worker
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.budget import Budget

RANDOM = {name for name, method in METHODS.items() if method.random}
WITHOUT_FILES = [check for check in contract.CHECKS if check is not contract.check_passes]


def name_of(check: contract.Check) -> str:
    return str(getattr(check, "__name__", check))


@pytest.mark.parametrize("check", WITHOUT_FILES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_method_keeps_its_contract(case: tuple[str, dict[str, Any]], check: contract.Check) -> None:
    name, extra = case
    if check is contract.check_identity and "scale" in extra:
        return
    if check is contract.check_seed and name in RANDOM:
        extra = {"density": 0.5} | extra
    check(name, parameters_of(name, extra))


def test_a_method_for_matrices_refuses_other_tensors() -> None:
    with pytest.raises(PlanError, match="merges matrices"):
        merge_tensors("regmean", [torch.ones(3)], statistics=[torch.ones(1, 1)])


@pytest.mark.parametrize("case", [case for case in CASES if METHODS[case[0]].statistics], ids=ids)
def test_the_size_of_the_statistics_does_not_matter(case: tuple[str, dict[str, Any]]) -> None:
    if case[1].get("epsilon"):
        return  # an absolute number that the user asks for
    given, parameters = contract.make_inputs(case[0]), parameters_of(*case)
    plain = merge_tensors(case[0], **given, **parameters)
    for factor in (1e-12, 1e-6, 1e6):
        statistics = [x.double() * factor for x in given["statistics"]]
        found = merge_tensors(case[0], **given | {"statistics": statistics}, **parameters)
        assert torch.allclose(found, plain, rtol=1e-6, atol=1e-6), factor


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_in_passes_or_at_once_gives_the_same_bytes(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """With blocks of 256 elements the largest tensor has three segments and does not fit a worker's share."""
    plan = plan_of(case, tmp_path)
    big = next(job for job in plan.tensors if job.name == "big")
    assert Budget(plan).resident([plan.tensors.index(big)]) > contract.least_memory(plan) or not big.needs_sums
    contract.compare_passes(plan, tmp_path)


@contextmanager
def soon_interrupted(worker: Worker, count: int) -> Iterator[Executor]:
    """Threads, and Ctrl-C after five results."""

    def some(results: Iterator[Any]) -> Iterator[Any]:
        yield from islice(results, 5)
        raise KeyboardInterrupt

    with thread_pool(worker, count) as executor:
        yield lambda tasks: some(executor(tasks))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_an_interrupted_merge_goes_on_to_the_same_bytes(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    plan = plan_of(case, tmp_path)
    execute(plan, tmp_path / "at-once", threads=1)
    with pytest.raises(KeyboardInterrupt):
        execute(
            plan, tmp_path / "resumed", memory=3 * contract.least_memory(plan), threads=3, engine=on(soon_interrupted)
        )
    assert not (tmp_path / "resumed").exists()
    execute(plan, tmp_path / "resumed", threads=1)
    assert output_of(tmp_path / "at-once") == output_of(tmp_path / "resumed")
