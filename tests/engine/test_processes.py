"""Plans and workers travel: other processes do the same tasks to the same bytes, also those that replace lost ones."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
from helpers_methods import Case, plan_of
from helpers_processes import Processes, on
from helpers_progress import Counted
from models import output_of

from mergekit_lfm.api.contract import least_memory
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import FormatError
from mergekit_lfm.plan.make import make_plan

CASES: list[Case] = [
    ("linear", {}),
    ("ties", {"density": 0.3, "scope": "global"}),
    ("regmean", {}),
    ("tsv", {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_pickled_plan_is_the_same_plan(case: Case, tmp_path: Path) -> None:
    plan = plan_of(case, tmp_path)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    for source in copy.sources:
        source.__dict__.pop("identity", None)
    copy.__dict__.pop("digest", None)
    assert copy.digest == plan.digest
    execute(plan, tmp_path / "one", threads=1)
    execute(copy, tmp_path / "two", threads=1)
    assert output_of(tmp_path / "one") == output_of(tmp_path / "two")


def test_processes_that_are_lost_are_replaced_to_the_same_bytes(tmp_path: Path) -> None:
    """One threshold over all tensors: sums and their parts travel, too."""
    plan = plan_of(CASES[1], tmp_path)
    execute(plan, tmp_path / "threads", memory=2 * least_memory(plan), threads=2)
    pool = Processes(kill=lambda number: number == 3)
    counted: list[int] = []
    progress = Counted(counted.append)
    execute(plan, tmp_path / "out", memory=2 * least_memory(plan), threads=2, engine=on(pool), progress=progress)
    assert output_of(tmp_path / "out") == output_of(tmp_path / "threads")
    assert pool.lost == 1 and max(pool.sizes) < 2000
    assert sum(counted) == plan.bytes_written


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_processes_killed_at_random_moments(case: Case, tmp_path: Path) -> None:
    plan, draw = plan_of(case, tmp_path), random.Random(case[0])
    execute(plan, tmp_path / "threads", threads=2)
    pool = Processes(kill=lambda _: draw.random() < 0.15)
    execute(plan, tmp_path / "out", memory=2 * least_memory(plan), threads=2, engine=on(pool))
    assert output_of(tmp_path / "out") == output_of(tmp_path / "threads")


@pytest.mark.slow
def test_an_error_in_a_process_ends_the_merge(tmp_path: Path) -> None:
    recipe = plan_of(CASES[0], tmp_path).recipe
    model = tmp_path / "m1" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-2] + b"\xc0\x7f")  # NaN in bfloat16
    plan = make_plan(recipe, block=256)
    with pytest.raises(FormatError, match="of m1 holds NaN or infinity"):
        execute(plan, tmp_path / "out", threads=2, engine=on(Processes()))
    assert not (tmp_path / "out").exists()
