"""The refusals of `align` and `repair` on the command line, and their messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llama import base_tensors, save
from helpers_commands import refusal, run
from safetensors.torch import save_file

from mergekit_lfm.artifacts.transform import open_transform


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two Llamas, a and b, where the commands run."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, base_tensors(seed))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--to", "b"], "--to"),
        (["-o", "t.st"], "--out"),
        (["--save", "near"], "--save"),
        (["--method", "weight_matching"], "--method"),  # given explicitly, though it is the default
        (["--to", "b", "-o", "t.st", "--no-normalise", "--order", "ffn.0"], "--to, --out, --order, --normalise"),
        (["--overwrite"], "--overwrite"),
    ],
)
def test_check_stands_alone(arguments: list[str], named: str, models: Path) -> None:
    result = run("align", "a", "--check", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--check only looks at MODEL, and writes nothing; leave out {named}." in " ".join(result.stderr.split())
    assert not (models / "t.st").exists() and not (models / "near").exists()


def test_check_needs_a_config_that_names_the_class(models: Path) -> None:
    (models / "chain").mkdir()
    shapes = {"0.weight": (5, 3), "0.bias": (5,), "1.weight": (2, 5), "1.bias": (2,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, models / "chain" / "model.safetensors")
    message = refusal(run("align", "chain", "--check"))
    assert "--check runs the model: found chain without a config.json, expected a folder with a config.json" in message
    config = json.loads((models / "a" / "config.json").read_text())
    cases: list[dict[str, Any]] = [{}, {"architectures": None}, {"architectures": []}]
    for architectures in cases:
        without = {name: value for name, value in config.items() if name != "architectures"}
        (models / "a" / "config.json").write_text(json.dumps(without | architectures))
        message = refusal(run("align", "a", "--check"))
        assert "found a whose config.json has no `architectures`, expected" in message


@pytest.mark.parametrize("restarts", ["1", "3"])
def test_only_the_groups_in_the_order_are_visited(restarts: str) -> None:
    order = ["--order", "ffn.1", "--order", "ffn.0"]
    result = run("align", "b", "--to", "a", *order, "--restarts", restarts, "-o", "t.st", "-q")
    assert (result.exit_code, result.stdout) == (0, "t.st\n")
    transform = open_transform("t.st")
    assert transform.elements.keys() == {"ffn.0", "ffn.1"}
    assert transform.info.options["order"] == ["ffn.1", "ffn.0"]
    assert "Visit only these groups, in the order given." in " ".join(run("align", "--help").stdout.split())


@pytest.mark.parametrize("method", ["activation_matching", "rotation", "ot"])
def test_an_order_beside_statistics_is_refused(method: str) -> None:
    result = run("align", "b", "--to", "a", "--method", method, "--stats", "s.st", "--order", "ffn.0", "-o", "t.st")
    assert result.exit_code == 2
    assert f"--order: {method} by activations finds every group by itself; leave it out." in result.stderr


def test_permutations_do_not_count_as_mixing() -> None:
    result = run("align", "b", "--to", "a", "--restarts", "1", "-o", "t.st")
    assert result.exit_code == 0
    assert "units and heads stand elsewhere" in result.stderr and "mixed" not in result.stderr
    result = run("align", "b", "--to", "a", "--method", "rotation", "--sweeps", "1", "-o", "r.st")
    assert "units and heads stand elsewhere, 3 groups mixed" in result.stderr


def test_repair_names_the_option_that_overwrites(models: Path) -> None:
    (models / "out").mkdir()
    (models / "out" / "mine.txt").write_text("mine")
    (models / "x.txt").write_text("some text")
    arguments = ["repair", "a", "--ends", "a", "b", "--data", "x.txt", "--task", "lm", "-o", "out"]
    assert refusal(run(*arguments)) == "error: out exists; choose another output, or use --overwrite\n"
    assert "exists" not in refusal(run(*arguments, "--overwrite"))  # continues until something cannot be repaired
    assert (models / "out" / "mine.txt").read_text() == "mine"
