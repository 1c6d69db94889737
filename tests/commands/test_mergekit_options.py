"""The options of mergekit-yaml on `merge`: those that mean something, those that need nothing, and those that clash."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import torch
from helpers_commands import answer, refusal, run
from models import output_of, save_checkpoint

from mergekit_lfm.commands.merge import merge
from mergekit_lfm.commands.mergekit import DEFAULTS, OPTIONS, MergekitOption

# Every option of mergekit-yaml 0.1.5, from its --help.
MERGEKIT = """
--allow-crimes --no-allow-crimes --unsafe-truncate-embeddings --no-unsafe-truncate-embeddings --trust-remote-code
--no-trust-remote-code --transformers-cache --lora-merge-cache --lora-merge-dtype --random-seed -v --quiet --no-quiet
--cuda --no-cuda --device --low-cpu-memory --no-low-cpu-memory --read-to-gpu --no-read-to-gpu --multi-gpu
--no-multi-gpu --gpu-rich --lazy-unpickle --no-lazy-unpickle -j --num-threads --async-write --no-async-write
--write-threads --out-shard-size --copy-tokenizer --no-copy-tokenizer --clone-tensors --no-clone-tensors
--write-model-card --no-write-model-card --safe-serialization --no-safe-serialization
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two models of three tensors of 64 bytes, and a recipe that draws random numbers."""
    draw = torch.Generator().manual_seed(0)
    for name in "oab":
        save_checkpoint(tmp_path / name, {k: torch.randn(4, 4, generator=draw) for k in "xyz"}, {"model_type": "llama"})
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: dare_linear\nbase_model: o\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.5, density: 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_option_of_mergekit_yaml_is_taken() -> None:
    taken = {name for option in merge.params if isinstance(option, click.Option) for name in option.opts}
    assert set(MERGEKIT.split()) - taken == set()
    declared = {option.flag for option in OPTIONS} | {option.short for option in OPTIONS if option.short} | {*DEFAULTS}
    assert declared - set(MERGEKIT.split()) == set()


@pytest.mark.usefixtures("folder")
def test_the_help_does_not_list_them() -> None:
    text = run("merge", "--help").stdout
    assert [option.flag for option in OPTIONS if f" {option.flag} " in text] == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--random-seed", "7"], ["--seed", "7"]),
        (["--out-shard-size", "100"], ["--max-shard-size", "100"]),
        (["--no-write-model-card"], ["--no-card"]),
        (["-j", "1"], ["--threads", "1"]),
        ([*DEFAULTS, "-vv"], ["-v"]),
    ],
    ids=lambda value: value[0],
)
def test_an_option_that_means_something_is_ours(folder: Path, theirs: list[str], ours: list[str]) -> None:
    assert run("merge", "recipe.yaml", "theirs", *theirs, "-q").exit_code == 0
    assert run("merge", "recipe.yaml", "ours", *ours, "-q").exit_code == 0
    if "--no-card" in ours:
        assert not (folder / "theirs/README.md").exists()
    else:
        assert output_of(folder / "theirs") == output_of(folder / "ours")
    default = run("merge", "recipe.yaml", "default", "-q")
    if theirs[0] in ("--random-seed", "--out-shard-size"):
        assert default.exit_code == 0 and output_of(folder / "theirs") != output_of(folder / "default")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("option", ["--cuda", "--gpu-rich"])
def test_cuda_is_the_device(option: str) -> None:
    plain, theirs = (
        run("merge", "recipe.yaml", "out", "--dry-run", *more) for more in (["--device", "cuda"], [option])
    )
    assert (plain.exit_code, plain.stderr) == (theirs.exit_code, theirs.stderr)
    if torch.cuda.is_available():
        assert json.loads(run("merge", "recipe.yaml", "out", "--dry-run", "--json", option).stdout)["device"] == "cuda"
    else:
        assert "cuda" in refusal(theirs)


@pytest.mark.usefixtures("folder")
def test_a_shard_size_of_5b_is_five_billion_bytes_as_in_mergekit() -> None:
    one = answer(run("merge", "recipe.yaml", "out", "--dry-run", "--json", "--out-shard-size", "5B"))
    other = answer(run("merge", "recipe.yaml", "out", "--dry-run", "--json", "--max-shard-size", "5GB"))
    assert one["digest"] == other["digest"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.sets], ids=lambda option: option.flag)
def test_every_other_option_is_one_notice(option: MergekitOption) -> None:
    flag, value = option.flag, [] if option.type is None else ["1"]
    result = run("merge", "recipe.yaml", "out", flag, *value, "--dry-run")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    verb = "has no effect" if option.ignored else "needs nothing"
    assert line.startswith(f"warning: {flag} {verb} here: ")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("theirs", "ours"), [("--cuda", "--device cpu"), ("--random-seed 1", "--seed 2"), ("-j 2", "--threads 1")]
)
def test_two_options_that_disagree_are_refused(theirs: str, ours: str) -> None:
    result = run("merge", "recipe.yaml", "out", *theirs.split(), *ours.split())
    assert result.exit_code == 2 and f"and {ours.split()[0]}, which say different things" in result.stderr
    agree = run("merge", "recipe.yaml", "out", "--random-seed", "3", "--seed", "3", "--dry-run")
    assert agree.exit_code == 0


@pytest.mark.usefixtures("folder")
def test_options_that_disagree_are_json_too() -> None:
    result = run("merge", "recipe.yaml", "out", "--cuda", "--device", "cpu", "--json")
    assert "--cuda and --device" in json.loads(result.stdout)["error"]["message"]
