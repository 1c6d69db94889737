"""Digests of the inputs decide: what is already there, what is resumed, and what the lock says."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from helpers_commands import run
from helpers_methods import Case, plan_of
from helpers_progress import Counted
from models import files_of, output_of, save_checkpoint
from safetensors.torch import load_file, save_file

from mergekit_lfm.api.contract import least_memory
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.roles import TensorRef
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.formats import WeightFile

COMPARING = "comparing"
FILE = "model.safetensors"
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "parameters": {"weight": 1},
    "models": [{"model": "a"}, {"model": "b"}],
}


def save_models(folder: Path) -> None:
    """Two models with a buffer that is copied."""
    draw = torch.Generator().manual_seed(0)
    for name in "ab":
        tensors = {key: torch.randn(40, 30, generator=draw) for key in ("u.weight", "v.weight")}
        save_checkpoint(folder / name, {**tensors, "ids": torch.arange(9)}, {})


def plan_in(folder: Path) -> Plan:
    return make_plan(Recipe.parse(LINEAR, where=folder))


def merge_in(folder: Path, out: str = "out", **how: Any) -> list[str]:
    """Merge a and b of a folder; the names of the work that was begun."""
    progress = Counted()
    execute(plan_in(folder), folder / out, progress=progress, **how)
    return progress.seen


def lock_in(folder: Path, out: str = "out") -> dict[str, Any]:
    lock: dict[str, Any] = json.loads((folder / out / "merge.lock.json").read_text())
    return lock


def rewrite(path: Path) -> None:
    """Change the last bytes, by another file in the place of the first, of its size and time."""
    status, data = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-4] + b"\1\2\3\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two models and their merge."""
    save_models(tmp_path)
    assert merge_in(tmp_path) == ["merging"]
    return tmp_path


def test_another_file_of_equal_size_and_time_is_not_taken_for_the_input(folder: Path) -> None:
    rewrite(folder / "b" / FILE)
    before = files_of(folder)
    with pytest.raises(PlanError, match=r"made from other inputs: v.weight of b changed since; .*--overwrite"):
        merge_in(folder)
    assert files_of(folder) == before
    assert merge_in(folder, overwrite=True) == ["merging"]
    merge_in(folder, "fresh")
    assert output_of(folder / "out") == output_of(folder / "fresh") != before


def test_a_copied_tensor_that_changed_in_both_models_is_seen(folder: Path) -> None:
    for name in "ab":
        tensors = load_file(folder / name / FILE)
        save_file({**tensors, "ids": tensors["ids"] + 1}, folder / name / FILE, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"ids of a, ids of b changed since"):
        merge_in(folder)


def test_touched_inputs_are_compared_once(folder: Path) -> None:
    assert merge_in(folder) == []
    before = files_of(folder / "out")
    touch(folder / "a" / FILE)
    assert [doing.split()[0] for doing in merge_in(folder)] == [COMPARING]
    assert merge_in(folder) == []
    assert files_of(folder / "out") == before
    merge_in(folder, "again")
    assert output_of(folder / "again") == output_of(folder / "out")


def test_trusted_times_need_no_comparison(folder: Path) -> None:
    """As on file systems whose inodes change from one mount to the next."""
    data = (folder / "a" / FILE).read_bytes()
    status = (folder / "a" / FILE).stat()
    (folder / "a" / FILE).unlink()
    (folder / "a" / FILE).write_bytes(data)
    os.utime(folder / "a" / FILE, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert merge_in(folder, trust_times=True) == []
    assert len(merge_in(folder)) == 1
    touch(folder / "a" / FILE)
    assert len(merge_in(folder, trust_times=True)) == 1


def test_the_option_of_the_command(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(json.dumps(LINEAR))
    data, status = (folder / "a" / FILE).read_bytes(), (folder / "a" / FILE).stat()
    (folder / "a" / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(folder / "a" / FILE, ns=(status.st_atime_ns, status.st_mtime_ns))
    command = ("merge", str(folder / "recipe.yaml"), str(folder / "out"))
    assert run(*command, "--trust-times").stderr.startswith("already there")
    refused = run(*command)
    assert refused.exit_code == 2 and "made from other inputs" in refused.stderr


def test_a_copy_of_the_inputs_has_the_same_lock(folder: Path) -> None:
    other = folder / "elsewhere"
    for name in "ab":
        shutil.copytree(folder / name, other / name)
    touch(other / "a" / FILE)
    merge_in(other)
    assert files_of(other / "out") == files_of(folder / "out")


def test_an_output_without_a_note_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert len(merge_in(folder)) == 1
    assert merge_in(folder) == []


# ------------------------------------------------------------------ the lock


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def test_the_lock_has_the_digests_of_the_inputs(folder: Path) -> None:
    a, b = (load_file(folder / name / FILE) for name in "ab")
    tensors = lock_in(folder)["tensors"]
    for name in ("u.weight", "v.weight"):
        assert tensors[name]["inputs"] == [digest(a[name]), digest(b[name])]
    assert "inputs" not in tensors["ids"] and tensors["ids"]["xxh3"] == [digest(a["ids"])]


CASES: list[Case] = [
    ("linear", {}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "scope": "global"}),
    ("fisher", {}),
    ("regmean", {}),
    ("tsv", {}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_digests_depend_on_nothing_but_the_bytes(tmp_path: Path, case: Case) -> None:
    """Tensors of several segments, read in one pass or several, in any number of threads."""
    plan = plan_of(case, tmp_path)
    assert max(job.segments for job in plan.tensors) == 3
    locks = []
    for threads, memory in ((1, None), (3, 3 * least_memory(plan))):
        execute(plan, tmp_path / f"out{threads}", threads=threads, memory=memory)
        locks.append(output_of(tmp_path / f"out{threads}")["merge.lock.json"])
    assert locks[0] == locks[1]
    lock = json.loads(locks[0])
    for job in plan.tensors:
        expected = [whole_digest(plan, source, job.segment_numel) for source in job.inputs]
        expected += [whole_digest(plan, source) for source in plan.grams.get(job.name, ())]
        assert lock["tensors"][job.name].get("inputs", []) == ([] if job.copied else expected)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_digests_take_no_reading_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    plan, read = plan_of(case, tmp_path), Counter[str]()
    read_into, read_all_into = WeightFile.read_into, WeightFile.read_all_into

    def count(file: WeightFile, name: str, start: int, into: memoryview) -> None:
        read[name] += len(into)
        read_into(file, name, start, into)

    def count_all(file: WeightFile, names: Iterable[str], into: memoryview) -> int:
        names = list(names)
        read.update({name: file.tensors[name][0].nbytes for name in names})
        return read_all_into(file, names, into)

    monkeypatch.setattr(WeightFile, "read_into", count)
    monkeypatch.setattr(WeightFile, "read_all_into", count_all)
    execute(plan, tmp_path / "out", threads=1)
    merged = [job for job in plan.tensors if not job.copied]
    assert merged and all(read[job.name] == len(job.inputs) * job.nbytes for job in merged)


def whole_digest(plan: Plan, source: TensorRef, numel: int | None = None) -> str:
    """The digest of a tensor in segments of so many elements."""
    tensor = plan.sources[source[0]].read(source[1])
    digests = [digest(part) for part in torch.split(tensor, numel or max(1, len(tensor)))]
    return digests[0] if len(digests) == 1 else xxhash.xxh3_128_hexdigest("".join(digests).encode())
