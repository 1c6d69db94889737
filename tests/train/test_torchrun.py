"""Two processes that torchrun starts: the steps of one, the metrics once, and the same bytes after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import Net, data, numbers
from helpers_tune import tiny  # noqa: F401
from safetensors.torch import load_file
from torch import nn

from mergekit_lfm import tune_model
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import squares
from mergekit_lfm.train.processes import Group, current_group, joined

ROOT = Path(__file__).parents[2]
TUNE = ["llama", "--data", "llama.jsonl", "--dev", "llama.jsonl", "--task", "lm", "--steps", "8", "--batch-size", "5"]
TUNE += ["--evaluate-every", "4", "--accumulate", "2", "--learning-rate", "1e-3", "--threads", "1"]

# Both processes die at one step, and go on; a model with dropout has random numbers to go on with.
SCRIPT = f"""
import math
from pathlib import Path
import torch
from helpers_training import Killed, Net, data, numbers
from mergekit_lfm.commands.app import main
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.hooks import Hook
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import squares
from mergekit_lfm.train.processes import joined

class Kill(Hook):
    def before(self, step, parameters):
        if step == 5:
            raise Killed

with joined("cpu") as group:
    options = Options(steps=9, batch_size=5, learning_rate=0.01, evaluate_every=2, accumulate=2)
    models = [Net(deep) for deep in (False, True, True)]
    always = Pauses(every_s=0, saving_share=math.inf)
    fit(models[0], data(), squares, options, dev=data(7), place=Path("line"))
    fit(models[1], data(), squares, options, dev=data(7))
    how = dict(dev=data(7), place=Path("killed"), request="r")
    try:
        fit(Net(True), data(), squares, options, hooks=[Kill()], pauses=always, **how)
    except Killed:
        begun = torch.distributed.barrier() or []  # the first has saved the state
        fit(models[2], data(), squares, options, tell=lambda done, *_: begun.append(done), **how)
        assert begun[:1] == ([] if group.rank else [6])
    torch.save([numbers(model) for model in models], f"numbers{{group.rank}}.pt")
    main(["tune", *{TUNE!r}, "-o", "two"], standalone_mode=False)
"""


@pytest.mark.slow
def test_two_processes_do_the_steps_of_one(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """With an odd batch in parts, and texts of unequal lengths, so that a mean of means would differ."""
    shutil.copytree(tiny / "llama", tmp_path / "llama")
    shutil.copy(tiny / "llama.jsonl", tmp_path)
    (tmp_path / "both.py").write_text(SCRIPT)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "both.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "two\n" and done.stderr.count("trained ") == 1  # one of the processes prints
    first, second = (torch.load(tmp_path / f"numbers{rank}.pt") for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))  # the processes stay the same
    assert torch.equal(first[1], first[2])  # killed and gone on, or not
    model = Net()
    options = Options(steps=9, batch_size=5, learning_rate=0.01, evaluate_every=2, accumulate=2)
    history = fit(model, data(), squares, options, dev=data(7))
    assert torch.allclose(first[0], numbers(model), atol=1e-12)
    assert [line["loss"] for line in record(tmp_path / "line")] == pytest.approx(
        [line["loss"] for line in history.record]
    )
    how: dict[str, Any] = {"steps": 8, "batch_size": 5, "evaluate_every": 4, "accumulate": 2, "learning_rate": 1e-3}
    file = tmp_path / "llama.jsonl"
    tune_model(tmp_path / "llama", file, tmp_path / "one", task="lm", dev=file, threads=1, **how)
    lines = [record(tmp_path / f"{name}.training") for name in ("one", "two")]
    assert [(line["step"], line["tokens"]) for line in lines[1]] == [
        (line["step"], line["tokens"]) for line in lines[0]
    ]
    values = [[line[key] for line in each for key in ("loss", "dev_loss") if key in line] for each in lines]
    assert values[1] == pytest.approx(values[0], rel=1e-5) and len(values[0]) == 10
    pairs = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(pairs[1][name], x, atol=1e-5) for name, x in pairs[0].items())


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_process_alone_is_a_group_and_shares_are_of_all() -> None:
    assert current_group() == Group(0, 1)
    with joined("cpu") as group:
        assert group == Group() and group.add(torch.device("cpu"), 2.0, 3) == [2.0, 3]
    parts = [Group(rank, 3).share([*range(7)]) for rank in range(3)]
    assert sorted(number for part in parts for number in part) == [*range(7)]
    layer = nn.Linear(2, 2)
    group.add_gradients(dict(layer.named_parameters()))
    assert layer.weight.grad is None
    with pytest.raises(PlanError, match="batch_size is 1; expected at least 2, the number of processes"):
        Group(1, 2).check_same(torch.device("cpu"), 0, 1)
