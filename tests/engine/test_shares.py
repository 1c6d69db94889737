"""Runs that each do a part of one merge, without an engine between them: together they write the bytes of one run."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from helpers_faults import snapshot
from helpers_methods import Case, plan_of
from helpers_processes import on
from models import files_of, output_of

from mergekit_lfm import merge
from mergekit_lfm.api.contract import least_memory
from mergekit_lfm.api.engines import find_started
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.engine.shares import Share
from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.threads import thread_pool
from mergekit_lfm.engine.worker import Worker
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output import writer
from mergekit_lfm.output.writer import Output, PublishedError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.locks import BusyError, lock_parts

CASES: list[Case] = [
    ("linear", {}),
    ("ties", {"density": 0.3, "scope": "global"}),
    ("slerp", {}),
    ("regmean", {}),
]
KILLED_RANKS = 5 if "LONG_TESTS" in os.environ else 1
FOUR = [(number, 4) for number in range(1, 5)]


def shared(plan: Plan, out: Path, part: tuple[int, int], **options: Any) -> bool:
    """Do a part with little memory, so that sums take passes; True if it was the last."""
    return not execute(plan, out, memory=2 * least_memory(plan), part=part, **options).waiting


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_the_parts_together_have_the_bytes_of_one_run(case: Case, tmp_path: Path) -> None:
    plan = plan_of(case, tmp_path)
    execute(plan, tmp_path / "one", threads=2)
    for parts in (FOUR, FOUR[::-1], [(number, 50) for number in range(1, 51)]):
        out = tmp_path / f"out-{len(parts)}-{parts[0][0]}"
        shares = [Share(plan, *part) for part in parts]
        assert sum(share.nbytes for share in shares) == plan.bytes_written
        assert all(
            sum(share.has(job, segment) for share in shares) == 1
            for job, each in enumerate(plan.tensors)
            for segment in range(each.segments)
        )
        ended = [shared(plan, out, part) for part in parts]
        assert ended == [False] * (len(parts) - 1) + [True]
        assert output_of(out) == output_of(tmp_path / "one")
        assert execute(plan, out, part=parts[0]).already_there


def test_most_of_a_merge_is_split_evenly(tmp_path: Path) -> None:
    plan = plan_of(CASES[0], tmp_path, big=(1000, 500), block=1 << 10)
    sizes = [Share(plan, *part).nbytes for part in FOUR]
    assert max(sizes) < 1.4 * plan.bytes_written / 4


@contextmanager
def soon_interrupted(worker: Worker, count: int) -> Iterator[Executor]:
    """Threads, but after two results the user interrupts."""
    with thread_pool(worker, count) as executor:

        def some(tasks: Iterable[Task]) -> Iterator[Result]:
            yield from islice(executor(tasks), 2)
            raise KeyboardInterrupt

        yield some


def test_a_part_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    plan, out = plan_of(CASES[0], tmp_path, big=(1000, 500), block=256), tmp_path / "out"
    execute(plan, tmp_path / "one", threads=1)
    with pytest.raises(KeyboardInterrupt):
        shared(plan, out, (2, 3), threads=1, engine=on(soon_interrupted))
    assert not shared(plan, out, (1, 3)) and not shared(plan, out, (3, 3))
    done = execute(plan, out, part=(2, 3))
    assert not done.waiting and done.resumed_bytes > 0
    assert output_of(out) == output_of(tmp_path / "one")


def test_a_run_alone_goes_on_from_parts(tmp_path: Path) -> None:
    plan, out = plan_of(CASES[0], tmp_path), tmp_path / "out"
    execute(plan, tmp_path / "one", threads=1)
    assert not shared(plan, out, (2, 3)) and not shared(plan, out, (1, 2))
    done = execute(plan, out)
    assert done.resumed_bytes >= Share(plan, 2, 3).nbytes and not done.waiting
    assert output_of(out) == output_of(tmp_path / "one")


def test_parts_of_other_inputs_are_refused(tmp_path: Path) -> None:
    plan, out = plan_of(CASES[0], tmp_path), tmp_path / "out"
    assert not shared(plan, out, (1, 2))
    model = tmp_path / "m1" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-2] + b"\x00\x3f")
    changed = make_plan(plan.recipe)
    execute(changed, tmp_path / "one", threads=1)
    before = files_of(tmp_path / "out.partial")
    with pytest.raises(PlanError, match=r"m1/model\.safetensors was changed since another part began"):
        shared(changed, out, (2, 2))
    assert files_of(tmp_path / "out.partial") == before
    rmtree(tmp_path / "out.partial")
    assert not shared(changed, out, (2, 2)) and shared(changed, out, (1, 2))
    assert output_of(out) == output_of(tmp_path / "one")


@pytest.mark.parametrize("again", [(1, 2), (2, 2)], ids=["its own run", "the last run"])
def test_damage_to_a_part_is_mended(again: tuple[int, int], tmp_path: Path) -> None:
    plan, out = plan_of(CASES[0], tmp_path), tmp_path / "out"
    execute(plan, tmp_path / "one", threads=1)
    assert not shared(plan, out, (1, 2))
    shard = next((tmp_path / "out.partial").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(plan.shards[0].header)] ^= 1  # of the first tensor, which is of the first part
    shard.write_bytes(data)
    done = execute(plan, out, part=again)
    assert any("damaged segments" in finding for finding in done.findings)
    assert done.waiting == (again == (1, 2))
    assert again == (2, 2) or shared(plan, out, (2, 2))
    assert output_of(out) == output_of(tmp_path / "one")


def test_a_folder_that_is_gone_is_not_taken_for_a_published_one(tmp_path: Path) -> None:
    plan, out = plan_of(CASES[0], tmp_path), tmp_path / "out"

    @contextmanager
    def removing(worker: Worker, count: int) -> Iterator[Executor]:
        with thread_pool(worker, count) as executor:
            yield executor
        rmtree(tmp_path / "out.partial")

    with pytest.raises(PlanError, match="was removed while this run wrote it"):
        shared(plan, out, (1, 2), engine=on(removing))


def test_a_torn_head_of_a_journal_is_written_again(tmp_path: Path) -> None:
    plan, out = plan_of(CASES[0], tmp_path), tmp_path / "out"
    assert not shared(plan, out, (1, 2))
    journal = tmp_path / "out.partial" / "merge.journal.1"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: whole.index(b"\n") + 5])
    assert not shared(plan, out, (1, 2))
    assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert execute(plan, out, part=(1, 2)).resumed_bytes == Share(plan, 1, 2).nbytes


def test_runs_that_would_disturb_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = plan_of(CASES[0], tmp_path), tmp_path / "out"
    monkeypatch.setattr(writer, "OPENING_S", 0.0)
    output = plan.digest, plan.shards, plan.inputs, out
    with Output(*output, part=1):
        with pytest.raises(BusyError, match=r"another run writes .*merge\.journal\.1; wait for it"):
            shared(plan, out, (1, 2))
        with pytest.raises(BusyError, match=r"another run is writing .*wait for it to end"):
            execute(plan, out)
        assert not shared(plan, out, (2, 2))
    with Output(*output), pytest.raises(BusyError, match="another run is writing"):
        shared(plan, out, (2, 2))
    assert not (tmp_path / "out").exists()
    execute(plan, tmp_path / "one", threads=1)
    assert shared(plan, out, (1, 2))
    assert output_of(out) == output_of(tmp_path / "one")


def test_a_part_that_is_late_leaves_the_output_alone(tmp_path: Path) -> None:
    """It has seen no output when it began, and then another part has made it."""
    plan, out = plan_of(CASES[0], tmp_path), tmp_path / "out"
    execute(plan, out)
    before = output_of(out)
    with pytest.raises(PublishedError):
        Output(plan.digest, plan.shards, plan.inputs, out, part=1)
    assert execute(plan, out, part=(1, 2), overwrite=True).already_there
    assert output_of(out) == before and not (tmp_path / "out.partial").exists()


def test_a_part_that_refuses_nan_does_not_publish_that_of_others(tmp_path: Path) -> None:
    recipe, out = plan_of(CASES[0], tmp_path).recipe, tmp_path / "out"
    model = tmp_path / "m1" / "model.safetensors"
    header = len(header_of(model))
    data = bytearray(model.read_bytes())
    data[header : header + 2] = b"\xc0\x7f"  # NaN in bfloat16, in the first tensor
    model.write_bytes(data)
    plan = make_plan(recipe)
    assert not shared(plan, out, (1, 2), nan="warn")
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        shared(plan, out, (2, 2))
    assert not out.exists()
    assert shared(plan, out, (2, 2), nan="warn")


def header_of(model: Path) -> bytes:
    """The bytes of a safetensors file before its data."""
    data = model.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def test_runs_keep_each_other_out_where_folders_lock_for_one_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, whose client locks folders for its own processes: here not even for these."""
    plan, out, lock = plan_of(CASES[0], tmp_path), tmp_path / "out", fcntl.flock

    def of_files(fd: int, how: int) -> None:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", of_files)
    monkeypatch.setattr(writer, "OPENING_S", 0.0)
    output = plan.digest, plan.shards, plan.inputs, out
    for number in (None, 1):
        with Output(*output, part=number):
            before = snapshot(tmp_path / "out.partial")
            for part in (None, (1, 2)):
                with pytest.raises(BusyError):
                    execute(plan, out, part=part)
            assert snapshot(tmp_path / "out.partial") == before
    with lock_parts(tmp_path / "out.partial", 0.0), pytest.raises(BusyError):
        shared(plan, out, (2, 2))
    assert not shared(plan, out, (1, 2)) and shared(plan, out, (2, 2))
    execute(plan, tmp_path / "one", threads=1)
    assert output_of(out) == output_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_work_that_cannot_be_shared(tmp_path: Path) -> None:
    data = plan_of(CASES[0], tmp_path).recipe.model_dump(exclude_unset=True)
    recipe = {"merge_method": "linear", "models": data["models"], "parameters": {"weight": 0.5}}
    recipe["models"] = [{"model": str(tmp_path / name)} for name in ("m1", "m2")]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (recipe, {"part": (3, 2)}, "3/2 is not a part; expected 1/2 to 2/2"),
        (recipe, {"part": (0, 0)}, "expected as 1/4"),
        (recipe, {"part": (1, 2), "resume": False}, "--no-resume deletes what other parts have done"),
        (recipe, {"part": (1, 2), "engine": "ray", "ray_address": "local"}, "--engine ray shares the work itself"),
        ([{**recipe, "name": "a"}, {**recipe, "models": [{"model": "a"}]}], {"part": (1, 2)}, "its recipe has stages"),
    ]
    for each, options, message in cases:
        with pytest.raises(PlanError, match=message):
            merge(each, tmp_path / "out", **options)
    assert not (tmp_path / "out.partial").exists()


def test_the_launcher_of_a_process_says_its_part() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}
    for environment, part, beside in (
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, (1, 2), 2),
        (slurm, (4, 4), 1),
        ({**slurm, "RANK": "1", "WORLD_SIZE": "8"}, (2, 8), 1),
    ):
        found = find_started(environment)
        assert found is not None and (found.part, found.beside) == (part, beside)
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    for environment in (
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {**slurm, "SLURM_STEP_NUM_TASKS": "1"},
        batch,
        {"RANK": "a"},
    ):
        assert find_started(environment) is None


@pytest.mark.slow
def test_torchrun_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    """Four ranks; one of them is killed at a random moment, after which torchrun starts all of them again."""
    plan_of(CASES[1], tmp_path, big=(3000, 1600))
    data = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "m0"),
        "models": [{"model": str(tmp_path / name)} for name in ("m1", "m2", "m3")],
        "parameters": {"weight": 0.5, "density": 0.3, "scope": "global"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    merge(tmp_path / "recipe.yaml", tmp_path / "threads" / "out", threads=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--max-restarts", "3"]
    command += ["-m", "mergekit_lfm", "merge", str(tmp_path / "recipe.yaml")]
    draw, killed, number = random.Random(0), 0, 0
    while killed < KILLED_RANKS:
        out = tmp_path / f"ranks-{number}" / "out"
        run = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True)
        while run.poll() is None and not out.with_name("out.partial").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        ranks = [pid for pid in _children(run.pid) if str(out) in _line(pid)]
        if ranks and not out.exists():
            os.kill(draw.choice(ranks), signal.SIGKILL)
            killed += 1
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
        assert output_of(out) == output_of(tmp_path / "threads" / "out")
        number += 1
        assert number < 50


def _children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
