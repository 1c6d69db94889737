"""Reptile over checkpoints: rounds by hand, an interruption, and several processes at the same rounds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_commands import run
from helpers_tune import tiny  # noqa: F401
from safetensors.numpy import load_file, save_file

from mergekit_lfm import FormatError, PlanError, meta_train, tune_model, verify_output
from mergekit_lfm.api import meta_rounds
from mergekit_lfm.api.merge import merge
from mergekit_lfm.train.examples import seed_of

HOW: dict[str, Any] = {"task": "embedding", "algorithm": "reptile", "on_disk": True, "shots": 3, "batch_size": 2}
HOW |= {"steps": 2, "inner_steps": 3, "inner_rate": 0.05, "learning_rate": 0.6, "threads": 1}
FILES = ["pairs0.jsonl", "pairs1.jsonl", "pairs2.jsonl"]


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    shutil.copytree(tiny / "encoder", tmp_path / "encoder")
    lines = (tiny / "encoder.jsonl").read_text().splitlines(keepends=True)
    for number, name in enumerate(FILES):
        (tmp_path / name).write_text("".join(lines[5 * number : 5 * number + 5]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("here")
def test_rounds_are_tunings_and_their_mean_and_go_on_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = list[list[str]]()

    def interrupted(document: dict[str, Any], out: Path, **options: Any) -> Any:
        merged.append([Path(each["model"]).name for each in document["models"]])
        if len(merged) == 2:
            raise KeyboardInterrupt
        return merge(document, out, **options)

    monkeypatch.setattr(meta_rounds, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        meta_train("encoder", FILES, "out", **HOW)
    assert not Path("out").exists() and list(Path("out.rounds").glob("*/000000/start"))
    made = meta_train("encoder", FILES, "out", **HOW)
    first, second, again = merged  # the first round is not made again
    assert second == again and not Path("out.rounds").exists()
    start = load_file("encoder/model.safetensors")
    base: str | Path = "encoder"
    for number, (rate, names) in enumerate(((0.6, first), (0.3, second))):
        tasks = [int(name.removeprefix("task-")) for name in names]
        for task in tasks:
            seed = seed_of(0, "task", number, task) % 2**63
            plain: dict[str, Any] = {"optimizer": "sgd", "schedule": "constant", "clip": 0.0, "threads": 1}
            plain |= {"task": "embedding", "steps": 3, "batch_size": 3, "learning_rate": 0.05, "seed": seed}
            tune_model(base, FILES[task], f"round{number}-{task}", **plain)
        tuned = [load_file(f"round{number}-{task}/model.safetensors") for task in tasks]
        start = {name: x + rate * np.mean([each[name] - x for each in tuned], 0) for name, x in start.items()}
        base = _saved(start, f"start{number}")
    for name, x in load_file("out/model.safetensors").items():
        np.testing.assert_allclose(x, start[name], rtol=0, atol=1e-6)
    assert made.result.steps == 2 and verify_output("out").result.differences == ()
    assert meta_train("encoder", FILES, "out", **HOW).already_there


def _saved(tensors: dict[str, Any], folder: str) -> Path:
    place = shutil.copytree("encoder", folder)
    save_file(tensors, Path(place) / "model.safetensors", metadata={"format": "pt"})
    return Path(place)


@pytest.mark.usefixtures("here")
def test_rounds_need_a_plain_step_over_files_and_leave_foreign_files_alone() -> None:
    with pytest.raises(PlanError, match="algorithm: found maml, expected reptile, whose outer step is a merge"):
        meta_train("encoder", FILES, "out", **{**HOW, "algorithm": "maml"})
    with pytest.raises(PlanError, match=r"test: .* expected none: tune and judge the result in later stages"):
        meta_train("encoder", FILES, "out", **HOW, test=FILES[0])
    Path("bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(FormatError, match=r"bad\.jsonl"):
        meta_train("encoder", [*FILES, "bad.jsonl"], "out", **HOW)
    assert not list(Path().glob("out*"))
    Path("out.rounds").mkdir()
    Path("out.rounds/mine").write_text("")
    with pytest.raises(PlanError, match=r"out\.rounds holds mine, which is of no meta-learning; move it away"):
        meta_train("encoder", FILES, "out", **HOW)
    assert Path("out.rounds/mine").exists() and not Path("out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_several_processes_share_the_rounds_and_a_killed_one_changes_nothing() -> None:
    words = "meta encoder --task embedding --algorithm reptile --on-disk --shots 3 --batch-size 2 --steps 4 --threads 1"
    files = [word for name in FILES for word in ("--data", name)]
    command = [*words.split(), "--inner-steps", "3", "--inner-rate", "0.05", "--learning-rate", "0.6", *files]
    assert run(*command, "-o", "alone").exit_code == 0

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "mergekit_lfm", *command, "-o", "shared"], stderr=subprocess.PIPE
        )

    running = [begin() for _ in range(3)]
    while not list(Path().glob("shared.rounds/*/000001/*")):
        time.sleep(0.05)
    running[0].kill()
    ends = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running[1:]] == [0, 0], ends
    assert weights("shared") == weights("alone") and not Path("shared.rounds").exists()
