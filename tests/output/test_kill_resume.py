"""A merge that is killed at any moment continues when it is run again, and leaves the files of an uninterrupted run."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_faults import (
    SYNCS,
    WRITES,
    Call,
    Forks,
    Ran,
    llama_tensors,
    near,
    save_model,
    snapshot,
)

Content = dict[str, tuple[object, ...]]
SOME_VOUCHED_FOR: dict[str, Any] = {
    "fail": "write",
    "where": "merge.journal",
    "nth": 3,
    "error": 0,
}  # after the plan and one batch
ALL_VOUCHED_FOR: dict[str, Any] = {"fail": "open", "where": "config.json", "nth": 1, "error": 0}
RECIPE = """\
merge_method: ties
base_model: models/base
models:
  - model: models/a
    parameters: {weight: 0.6, density: 0.4}
  - model: models/b
    parameters: {weight: 0.5, density: 0.3}
seed: 7
"""

# Of the moments of a kill every fourth one; the others are slow.
QUARTERS = [pytest.param(part, id=f"steps {part}, ...", marks=[pytest.mark.slow] if part else []) for part in range(4)]


@dataclass(frozen=True)
class Job:
    """A folder with models and a recipe, and the command that merges them."""

    cli: Forks
    folder: Path
    options: tuple[str, ...] = ("--threads", "1")

    def run(self, *options: object, out: str = "out", **fault: Any) -> Ran:
        """Run the command. Data are synced in small batches, so that the journal has some of them early on."""
        return self.cli.run("recipe.yaml", out, *self.options, *options, cwd=self.folder, sync_bytes=20_000, **fault)

    @cached_property
    def whole(self) -> Ran:
        """An uninterrupted run."""
        self.start_over()
        ran = self.run()
        assert ran.code == 0, ran.err
        return ran

    @cached_property
    def expected(self) -> Content:
        """The files of an uninterrupted run."""
        assert self.whole.code == 0
        return snapshot(self.folder / "out")

    def start_over(self) -> None:
        """Remove the files of earlier runs."""
        for path in self.folder.glob("out*"):
            shutil.rmtree(path)

    def kill(self, **fault: Any) -> Ran:
        """A fresh run that is killed, for example at a call: `kill_at`."""
        self.start_over()
        killed = self.run(**fault)
        assert killed.code in (-signal.SIGKILL, 0), killed.err
        return killed

    def finish(self, *options: object) -> Ran:
        """Run the command (again), which leaves the files of an uninterrupted run, byte for byte, and nothing else."""
        ran = self.run(*options)
        assert ran.code == 0, ran.err
        assert self.names() == {"models", "recipe.yaml", "out"}
        found = snapshot(self.folder / "out")
        assert found.keys() == self.expected.keys()
        assert [name for name in found if found[name] != self.expected[name]] == []
        return ran

    def keep(self, name: str) -> None:
        """Copy the files of a run, for `put`."""
        shutil.copytree(self.folder / name, self.folder.with_name(f"{self.folder.name}-{name}"))

    def put(self, name: str) -> None:
        """Start over with the files of this copy."""
        self.start_over()
        shutil.copytree(self.folder.with_name(f"{self.folder.name}-{name}"), self.folder / name)

    def names(self) -> set[str]:
        """The names of the files in the folder."""
        return {path.name for path in self.folder.iterdir()}

    def fresh(self, *options: object) -> Content:
        """The output of the command without unfinished work."""
        assert self.run(*options, out="fresh/out").code == 0  # of one name: the card is titled with it
        made = snapshot(self.folder / "fresh/out")
        shutil.rmtree(self.folder / "fresh")
        return made


def make_models(folder: Path, *, hidden: int = 32, vocab: int = 64) -> None:
    """A base and two fine-tunes in bfloat16 and three shards, with an integer buffer that is only copied."""
    base = {name: tensor.bfloat16() for name, tensor in llama_tensors(0, hidden=hidden, vocab=vocab).items()}
    base["model.position_ids"] = torch.arange(512).reshape(1, 512)
    for name, tensors in {"base": base, "a": near(base, 1), "b": near(base, 2)}.items():
        save_model(folder / "models" / name, tensors, shards=3)
    (folder / "recipe.yaml").write_text(RECIPE)


@pytest.fixture(scope="module", params=["1", "2"], ids=["one thread", "two threads"])
def job(request: pytest.FixtureRequest, cli: Forks, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    make_models(folder)
    job = Job(cli, folder, ("--threads", request.param))
    assert job.expected
    return job


@pytest.fixture
def one(cli: Forks, tmp_path: Path) -> Job:
    make_models(tmp_path)
    job = Job(cli, tmp_path)
    assert job.expected
    job.start_over()
    return job


def last(whole: Ran, wanted: Callable[[Call], bool]) -> int:
    """The number, from 1, of the last such call of a run."""
    return max(number for number, call in enumerate(whole.calls, 1) if wanted(call))


def last_data_write(whole: Ran) -> int:
    """The call after which only publishing is left."""
    return last(whole, lambda c: c.name in WRITES and c.nbytes > 8 and c.target.endswith(".safetensors"))


def renaming(whole: Ran) -> int:
    """The call that gives the finished folder its name."""
    return last(whole, lambda c: c.name in ("rename", "replace") and Path(c.target.split(" -> ")[1]).name == "out")


def spread(whole: Ran, moments: int, seed: int) -> list[int]:
    """One random call in each of so many equal parts of the run."""
    total = len(whole.calls)
    pick = random.Random(seed)
    return [pick.randrange(total * i // moments, total * (i + 1) // moments) + 1 for i in range(moments)]


def killed_and_finished(job: Job, moments: Iterable[int], **fault: Any) -> int:
    """Kill a fresh run at each of the moments and run it again; returns the number of runs that were killed.

    Every second kill comes in the middle of its call, if that call writes.
    """
    killed = 0
    for moment in moments:
        killed += job.kill(kill_at=moment, torn=moment % 2 == 1, **fault).code == -signal.SIGKILL
        job.finish()
    return killed


# ------------------------------------------------------------------ kills


def test_the_faults_see_the_work(job: Job) -> None:
    """Every byte of weights passes a counted call, so that the moments below cover the whole run."""
    weights = sum((job.folder / "out" / name).stat().st_size for name in job.expected if name.endswith(".safetensors"))
    assert weights * 0.9 < job.whole.bytes_of_weights() <= weights * 1.1
    assert job.whole.count("preadv", "copy_file_range", where="models/") > 50
    assert job.whole.count("write", where="merge.journal") >= 4
    assert len(job.whole.calls) - last_data_write(job.whole) >= 8


KILLS = [6, pytest.param(60 if "LONG_TESTS" in os.environ else 24, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_random_moments(job: Job, kills: int) -> None:
    assert killed_and_finished(job, spread(job.whole, kills, seed=1)) >= kills - 2


@pytest.mark.parametrize("part", QUARTERS)
def test_killed_at_every_publish_step(one: Job, part: int) -> None:
    """One thread publishes, however many have merged."""
    moments = range(last_data_write(one.whole) + part, len(one.whole.calls) + 1, 4)
    assert killed_and_finished(one, moments) >= len(moments) - 3


@pytest.mark.parametrize("kills", KILLS)
def test_power_failure_loses_nothing_that_the_journal_vouches_for(job: Job, kills: int) -> None:
    """The journal survives, but what no sync covered is damaged."""
    assert killed_and_finished(job, spread(job.whole, kills, seed=3), lose_unsynced=True) >= kills - 2


def test_everything_is_synced_before_it_is_published(one: Job) -> None:
    publish = renaming(one.whole) - 1
    synced: set[str] = set()
    for call in one.whole.calls[:publish]:
        if call.name in SYNCS:
            synced.add(Path(call.target).name)
        elif call.name in WRITES:  # such as a header's length, the last of a shard
            synced.discard(Path(call.target).name)
        elif call.name in ("rename", "replace"):
            old, new = (Path(path).name for path in call.target.split(" -> "))
            synced |= {new} & {new if old in synced else ""}
    assert synced >= {name for name in one.expected if "/" not in name}
    assert str(one.folder) in {call.target for call in one.whole.calls[publish:] if call.name in SYNCS}


def test_killed_again_and_again(job: Job) -> None:
    """Ten kills of one and the same merge, then the end."""
    job.start_over()
    pick = random.Random(4)
    for _ in range(10):
        job.run(kill_at=pick.randrange(15, 80), torn=True)
    job.finish()


@pytest.mark.slow
def test_killed_by_the_clock(cli: Forks, tmp_path: Path) -> None:
    """A run of seconds, with tensors of several segments, killed wherever it happens to be."""
    make_models(tmp_path, hidden=1024, vocab=20_000)
    job = Job(cli, tmp_path, ("--threads", "2"))
    start = time.monotonic()
    assert job.whole
    seconds = time.monotonic() - start
    assert job.expected
    pick = random.Random(5)
    killed = 0
    for _ in range(10):
        job.start_over()
        killed += job.run(kill_after_s=pick.uniform(0.05, seconds)).code == -signal.SIGKILL
        job.finish()
    assert killed >= 5


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupt_says_how_to_go_on(one: Job, sent: signal.Signals, code: int) -> None:
    stopped = one.run(**SOME_VOUCHED_FOR, signal=sent)
    assert stopped.code == code
    assert stopped.out == ""
    assert "Traceback" not in stopped.err
    assert "same command again" in stopped.err
    assert (one.folder / "out.partial" / "merge.journal").stat().st_size > 0
    assert not (one.folder / "out").exists()
    assert one.finish().bytes_of_weights() < one.whole.bytes_of_weights()


# ------------------------------------------------------------------ reuse


@pytest.fixture
def partial(one: Job) -> Path:
    """The folder of a run that was killed when all its data were written and journalled."""
    one.kill(**ALL_VOUCHED_FOR)
    folder = one.folder / "out.partial"
    assert (folder / "merge.journal").read_bytes().count(b"\n") > len(one.expected)
    return folder


def test_finished_work_is_not_done_again(one: Job) -> None:
    """The later the kill, the less is left to write."""
    rest = []
    for fault in ({"kill_at": 1}, SOME_VOUCHED_FOR, ALL_VOUCHED_FOR):
        one.kill(**fault)
        rest.append(one.finish().bytes_of_weights())
    headers = rest[-1]
    assert rest[0] == one.whole.bytes_of_weights()
    assert headers < 3 * 5000
    assert headers < rest[1] < rest[0]


TAILS = {
    "a line cut short": b'{"tensor": "x", "seg',
    "zeros": b"\0" * 300,
    "not text": b"\xff\xfe\n",
    "a list": b"[]\n",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_torn_end_of_the_journal_is_ignored(one: Job, partial: Path, tail: bytes) -> None:
    with (partial / "merge.journal").open("ab") as journal:
        journal.write(tail)
    one.finish()


def test_shortened_journal_is_believed_as_far_as_it_goes(one: Job, partial: Path) -> None:
    whole = (partial / "merge.journal").read_bytes()
    written = []
    for keep in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        one.kill(**ALL_VOUCHED_FOR)
        (partial / "merge.journal").write_bytes(whole[:keep])
        written.append(one.finish().bytes_of_weights())
    assert written == sorted(written, reverse=True)
    assert written[-1] < written[0]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-500])])
def test_lost_shard_is_written_again(one: Job, partial: Path, change: Callable[[Path], object]) -> None:
    """The journal has tensors whose file is gone or cut: they are merged again."""
    change(next(partial.glob("*2-of-*.safetensors")))
    one.finish()


def change_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("weight: 0.6", "weight: 0.61"))


def change_seed(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("seed: 7", "seed: 8"))


def change_input(folder: Path) -> None:
    path = next((folder / "models" / "a").glob("*1-of-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-2000:] = content[-4000:-2000]
    path.write_bytes(content)


@pytest.mark.parametrize("change", [change_recipe, change_seed])
@pytest.mark.usefixtures("partial")
def test_work_on_another_plan_is_not_reused(one: Job, change: Callable[[Path], None]) -> None:
    change(one.folder)
    before = snapshot(one.folder / "out.partial")
    refused = one.run()
    assert refused.code == 2 and "unfinished work of another merge" in refused.err and "--no-resume" in refused.err
    assert snapshot(one.folder / "out.partial") == before
    again = one.run("--no-resume")
    assert again.code == 0, again.err
    assert again.bytes_of_weights() == one.whole.bytes_of_weights()
    found = snapshot(one.folder / "out")
    assert found != one.expected
    assert found == one.fresh()
    assert "out.partial" not in one.names()


@pytest.mark.usefixtures("partial")
def test_work_on_other_inputs_is_done_again(one: Job) -> None:
    change_input(one.folder)
    again = one.run()
    assert again.code == 0 and "was changed since the interrupted run, whose work was done again" in again.err
    assert again.bytes_of_weights() == one.whole.bytes_of_weights()
    found = snapshot(one.folder / "out")
    assert found != one.expected
    assert found == one.fresh()


@pytest.mark.usefixtures("partial")
def test_shard_size_belongs_to_the_plan(one: Job) -> None:
    assert one.run("--max-shard-size", "20KB").code == 2
    assert one.run("--max-shard-size", "20KB", "--no-resume").code == 0
    assert snapshot(one.folder / "out") == one.fresh("--max-shard-size", "20KB")
    assert "out.partial" not in one.names()


def test_no_resume_starts_over(one: Job, partial: Path) -> None:
    for shard in partial.glob("*.safetensors"):
        shard.write_bytes(b"\xa5" * shard.stat().st_size)
    assert one.finish("--no-resume").bytes_of_weights() == one.whole.bytes_of_weights()


def test_no_resume_starts_over_even_from_complete_work(one: Job) -> None:
    one.kill(kill_at=renaming(one.whole))
    for shard in (one.folder / "out.partial").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100] + bytes(100))
    one.finish("--no-resume")


@pytest.mark.parametrize(("other", "step"), [("--quiet", 2), ("--seed=9", 5)])
def test_killed_while_complete_work_is_cleared_away(one: Job, other: str, step: int) -> None:
    """A half cleared folder does not count as complete, for the same plan and for another."""
    one.kill(kill_at=renaming(one.whole))
    one.keep("out.partial")
    for moment in range(1, 25, step):
        one.put("out.partial")
        one.run(other, "--no-resume", kill_at=moment)
        one.finish("--overwrite", "--no-resume")


def test_two_runs_do_not_write_the_same_output(one: Job, partial: Path) -> None:
    before = snapshot(partial, times=True)
    folder = os.open(partial, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    second = one.run()
    os.close(folder)
    assert second.code == 2
    assert second.err.startswith("error: another run")
    assert snapshot(partial, times=True) == before
    one.finish()


OTHER_WAYS = [("--threads", "3"), ("--memory", "40MB"), ("--nan", "warn"), ("-q",)]


@pytest.mark.parametrize("options", OTHER_WAYS, ids=" ".join)
def test_how_it_runs_may_change_between_the_runs(one: Job, options: tuple[str, ...]) -> None:
    one.kill(**SOME_VOUCHED_FOR)
    assert one.finish(*options).bytes_of_weights() < one.whole.bytes_of_weights()


def test_done_is_done(one: Job) -> None:
    one.finish()
    before = snapshot(one.folder / "out", times=True)
    again = one.finish()
    assert "already there" in again.err
    assert again.bytes_of_weights() == 0
    assert snapshot(one.folder / "out", times=True) == before


# ------------------------------------------------------------------ overwriting


def is_somewhere(folder: Path, content: Content) -> bool:
    """True if OUT, OUT.partial, or the folder being replaced holds exactly these files, whatever else it holds."""
    found = (snapshot(path) for path in [*folder.glob("out*"), *folder.glob("out*/merge.replaced")])
    return any(all(files.get(name) == entry for name, entry in content.items()) for files in found)


@pytest.mark.parametrize("part", QUARTERS)
def test_overwriting_killed_at_every_step_loses_no_output(one: Job, part: int) -> None:
    """Until the new output is at OUT the old one is kept whole; the same command then finishes the exchange."""
    one.finish()
    one.keep("out")
    change_recipe(one.folder)
    new = one.fresh()
    whole = one.run("--overwrite")
    assert whole.code == 0, whole.err
    assert snapshot(one.folder / "out") == new
    moments = (5, last_data_write(whole) // 2, *range(last_data_write(whole), len(whole.calls) + 1))
    for moment in moments[part::4]:
        one.put("out")
        killed = one.run("--overwrite", kill_at=moment)
        found = snapshot(one.folder / "out") if (one.folder / "out").exists() else {}
        at_out = {name: entry for name, entry in found.items() if not name.startswith("merge.replaced")}
        step = f"call {moment}: {killed.calls[-1]}"
        assert at_out == new or is_somewhere(one.folder, one.expected), step
        assert at_out in (new, one.expected) or is_somewhere(one.folder, new), step
        again = one.run("--overwrite")
        assert again.code == 0, f"{step}: {again.err}"
        assert one.names() == {"models", "recipe.yaml", "out"}, step
        assert snapshot(one.folder / "out") == new, step


def test_overwriting_given_up_half_way_leaves_the_old_output(one: Job) -> None:
    """The recipe is changed back after the kill: the old output is complete and in its place, or comes back to it."""
    one.finish()
    one.keep("out")
    change_recipe(one.folder)
    whole = one.run("--overwrite")
    for moment in range(renaming(whole) - 5, renaming(whole) + 1):
        one.put("out")
        change_recipe(one.folder)
        one.run("--overwrite", kill_at=moment)
        (one.folder / "recipe.yaml").write_text(RECIPE)
        assert one.run("--overwrite", "--no-resume").code == 0
        assert snapshot(one.folder / "out") == one.expected


def test_another_output_is_kept_without_overwrite(one: Job) -> None:
    one.finish()
    change_recipe(one.folder)
    refused = one.run()
    assert refused.code == 2
    assert refused.err.startswith("error:")
    assert "--overwrite" in refused.err
    assert one.names() == {"models", "recipe.yaml", "out"}
    assert snapshot(one.folder / "out") == one.expected
