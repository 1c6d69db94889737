"""`verify --against-inputs`: the inputs are read again, and tensors computed again from them."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from helpers_commands import run
from helpers_methods import Case, plan_of
from models import files_of, save_checkpoint

from mergekit_lfm.engine.execute import execute
from mergekit_lfm.engine.recompute import choose, recompute
from mergekit_lfm.machine.accelerators import HOST
from mergekit_lfm.machine.progress import SILENCE
from mergekit_lfm.output.lock import own_digest, read_lock

RECIPE = """\
merge_method: ties
base_model: a
models: [{model: b, parameters: {weight: 1, density: 0.5}}]
"""
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a merge of two models."""
    draw = torch.Generator().manual_seed(0)
    for name in "ab":
        tensors = {f"{i}.weight": torch.randn(6, 5, generator=draw) for i in range(12)}
        save_checkpoint(tmp_path / name, {**tensors, "ids": torch.arange(3)}, {})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert run("merge", "recipe.yaml", "out", "--seed", "3").exit_code == 0
    return tmp_path


def verify(*options: str) -> tuple[int, list[str], list[str]]:
    """Exit code, problems and recomputed tensors of the command."""
    answer = run("verify", "out", "--against-inputs", "recipe.yaml", "--seed", "3", "--json", *options)
    facts = json.loads(answer.stdout)
    assert "the inputs, which are not read again" not in facts["not_covered"]
    return answer.exit_code, facts["problems"], facts["recomputed"]


def change_tensor(path: Path, offset: int) -> None:
    """Change a byte before the end, and set the time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-offset, os.SEEK_END)
        byte = file.read(1)
        file.seek(-offset, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_output_of_its_inputs_is_good(folder: Path) -> None:
    before = files_of(folder)
    code, problems, recomputed = verify()
    assert (code, problems, len(recomputed)) == (0, [], 8)
    assert verify()[2] == recomputed
    assert len(verify("--sample", "all")[2]) == 13
    assert verify("--sample", "0")[2] == []
    assert files_of(folder) == before
    text = run("verify", "out", "--against-inputs", "recipe.yaml", "--seed", "3").stdout
    assert "good, all as its lock says and its inputs give; 8 tensors computed again" in text


def test_a_changed_input_is_found(folder: Path) -> None:
    change_tensor(folder / "b" / FILE, 1)
    names = sorted(f"{i}.weight" for i in range(12))
    assert verify() == (1, [f"{names[-1]} of b was changed"], [])


def test_a_changed_output_is_found(folder: Path) -> None:
    change_tensor(folder / "out" / FILE, 1)
    code, problems, _ = verify()
    assert code == 1 and problems == ["9.weight was changed"]


def test_a_lock_that_claims_other_bytes_is_found(folder: Path) -> None:
    """A merge that went wrong, with a lock of its own result: only computing again shows it."""
    change_tensor(folder / "out" / FILE, 1)
    path = folder / "out" / "merge.lock.json"
    lock = json.loads(path.read_text())
    problem = run("verify", "out", "--json")
    assert json.loads(problem.stdout)["problems"] == ["9.weight was changed"]
    data = (folder / "out" / FILE).read_bytes()
    lock["tensors"]["9.weight"]["xxh3"] = [xxhash.xxh3_128_hexdigest(data[-120:])]
    lock["digest"] = own_digest(lock)
    path.write_text(json.dumps(lock))
    assert run("verify", "out").exit_code == 0
    assert verify("--sample", "all")[:2] == (1, ["9.weight is not what the inputs give"])


def test_another_recipe_is_refused(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("0.5", "0.6"))
    refused = run("verify", "out", "--against-inputs", "recipe.yaml", "--seed", "3")
    assert refused.exit_code == 2 and "out is not the output of this recipe" in refused.stderr


CASES: list[Case] = [("ties", {"density": 0.3, "scope": "global"}), ("regmean", {}), ("tsv", {})]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_tensors_are_computed_again_alone(tmp_path: Path, case: Case) -> None:
    """Also those that are solved together, and matrices, each method having its turn in the sample."""
    plan = plan_of(case, tmp_path)
    execute(plan, tmp_path / "out")
    lock, names = read_lock(tmp_path / "out"), choose(plan, 4)
    methods = Counter(job.method for job in plan.tensors if job.name in names)
    assert methods.keys() == {job.method for job in plan.tensors}
    found = recompute(plan, lock, names, memory=1 << 30, threads=2, accelerator=HOST, progress=SILENCE)
    assert found == []
    tensors = {name: replace(x, digests=("0" * 32,) * len(x.digests)) for name, x in lock.tensors.items()}
    lock = replace(lock, tensors=tensors)
    found = recompute(plan, lock, names, memory=1 << 30, threads=2, accelerator=HOST, progress=SILENCE)
    assert sorted(found) == sorted(names)
