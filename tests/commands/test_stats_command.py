"""`mergekit-lfm stats` and `inspect` of its output: options, streams, exit codes, interruption, the bar."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import answer, on_a_terminal, refusal, run, start, wait_for
from helpers_text import bert_config, byte_tokenizer, llama_config, save_model, write_lines

from mergekit_lfm import open_checkpoint
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.batches import digest_of
from mergekit_lfm.runtime.data import read_data

CLASSIFY = ("--data", "x.jsonl", "--task", "classification", "-o", "out/s.safetensors")
LM = ("--data", "x.txt", "--task", "lm", "-o", "s.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers a and b and the language model m, with data."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        config = bert_config(num_labels=3, initializer_range=0.5 if name == "a" else 0.6)
        save_model(folder / name, "BertForSequenceClassification", config, byte_tokenizer(special=True))
    save_model(folder / "m", "LlamaForCausalLM", llama_config(), byte_tokenizer())
    write_lines(folder / "x.jsonl", *({"text": "text"[: i % 4 + 1], "label": i % 3} for i in range(10)))
    (folder / "x.txt").write_text("a document of some length, " * 8)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with links to the models."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_result_is_a_path_and_a_summary() -> None:
    result = run("stats", "gram", "a", *CLASSIFY)
    assert (result.exit_code, result.stdout) == (0, "out/s.safetensors\n")
    found = open_statistics("out/s.safetensors")
    assert found.info.kind == "gram" and found.info.examples == 10
    assert found.info.models == (open_checkpoint("a").content,)
    tokens = sum(len("text"[: i % 4 + 1]) + 2 for i in range(10))
    lines = dict(line.split(maxsplit=1) for line in result.stderr.splitlines())
    assert lines["statistics"].startswith(f"gram of {len(found.info.layers)} layers in {len(found.tensors)} tensors, ")
    assert lines["data"] == f"{found.info.data}: 10 examples, {tokens} tokens"
    assert lines["model"] == found.info.models[0]
    assert lines["options"] == "dtype float32, task classification"
    assert run("stats", "gram", "a", *CLASSIFY, "-q").stderr == ""


@pytest.mark.usefixtures("folder")
def test_json_is_one_object() -> None:
    found = answer(run("stats", "fisher", "a", *CLASSIFY, "--labels", "true", "--json"))
    facts = open_statistics("out/s.safetensors").info
    assert (found["out"], found["kind"], found["already_there"]) == ("out/s.safetensors", "fisher", False)
    assert (found["examples"], found["tokens"], found["norm"]) == (10, None, facts.norm)
    assert (found["options"], found["skipped"]) == (facts.options, facts.skipped)
    assert found["entries"] == len(open_checkpoint("out/s.safetensors")) > 0
    assert answer(run("stats", "fisher", "a", *CLASSIFY, "--labels", "true", "--json"))["already_there"] is True


@pytest.mark.usefixtures("folder")
def test_the_same_again_is_already_there_and_another_is_refused() -> None:
    run("stats", "gram", "a", *CLASSIFY)
    before = Path("out/s.safetensors").stat().st_mtime_ns
    result = run("stats", "gram", "a", *CLASSIFY)
    assert (result.exit_code, result.stdout) == (0, "out/s.safetensors\n")
    assert result.stderr.startswith("already there: ")
    assert Path("out/s.safetensors").stat().st_mtime_ns == before
    assert "exists" in refusal(run("stats", "gram", "b", *CLASSIFY))
    assert run("stats", "gram", "b", *CLASSIFY, "--overwrite").exit_code == 0
    assert open_statistics("out/s.safetensors").info.models == (open_checkpoint("b").content,)


@pytest.mark.usefixtures("folder")
def test_cross_is_of_two_models() -> None:
    run("stats", "cross", "a", "b", *CLASSIFY, "--layers", "query", "--layers", "intermediate")
    found = open_statistics("out/s.safetensors")
    assert found.info.models == (open_checkpoint("a").content, open_checkpoint("b").content)
    assert len(found.info.layers) == 2
    assert all("query" in name or "intermediate" in name for name in found.info.layers)
    assert run("stats", "cross", "a", *CLASSIFY).exit_code == 2


@pytest.mark.usefixtures("folder")
def test_a_language_model_on_windows_of_a_text() -> None:
    run("stats", "gram", "m", *LM, "--window", "9", "--max-examples", "5", "--dtype", "float64")
    facts = open_statistics("s.safetensors").info
    loaded_by_hand = read_data("x.txt", "lm", byte_tokenizer(), window=9, max_examples=5)
    assert (facts.examples, facts.data) == (5, digest_of(loaded_by_hand))
    assert {layer.count for layer in facts.layers.values()} == {45}


def test_arrays_for_a_model_without_a_tokenizer(folder: Path) -> None:
    save_model(folder / "n", "BertForSequenceClassification", bert_config())
    np.savez("x.npz", input_ids=np.arange(12).reshape(3, 4))
    run("stats", "fisher", "n", "--data", "x.npz", "--task", "classification", "-o", "s.safetensors")
    assert open_statistics("s.safetensors").info.examples == 3
    options = ("--task", "classification", "-o", "t.safetensors")
    assert "the model has no tokenizer" in refusal(run("stats", "gram", "n", "--data", "x.jsonl", *options))


@pytest.mark.usefixtures("folder")
def test_every_option_reaches_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def record(*args: Any, **options: Any) -> None:
        given.update(options, args=args)
        raise PlanError("that was all")

    monkeypatch.setattr("mergekit_lfm.api.stats.collect", record)
    options = (
        "--labels sampled --samples 3 --seed 7 --layers x --layers y --max-examples 4 --window 8 --batch-size 2 "
        "--memory 1GB --device meta --dtype bfloat16 --overwrite --no-resume"
    )
    assert refusal(run("stats", "fisher", "a", *CLASSIFY, *options.split())) == "error: that was all\n"
    assert given.pop("args") == ("fisher", Path("a"), Path("x.jsonl"), Path("out/s.safetensors"))
    assert callable(given.pop("progress"))
    assert {name: value for name, value in given.items() if value is not None} == {
        "task": "classification",
        "labels": "sampled",
        "samples": 3,
        "seed": 7,
        "layers": ("x", "y"),
        "max_examples": 4,
        "window": 8,
        "batch_size": 2,
        "memory": 10**9,
        "device": "meta",
        "dtype": "bfloat16",
        "overwrite": True,
        "resume": False,
    }


@pytest.mark.usefixtures("folder")
def test_threads_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run("stats", "gram", "a", *CLASSIFY, "--threads", "3")
    run("stats", "gram", "a", *CLASSIFY)
    assert asked == [3, 2]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gram", "nowhere", *CLASSIFY], r"nowhere: found no config.json"),
        (["gram", "a", "--data", "no.jsonl", *CLASSIFY[2:]], "no.jsonl"),
        (["gram", "a", *CLASSIFY, "--layers", "nothing"], "nothing"),
        (["fisher", "m", "--labels", "expected", *LM], "expected"),
        (["gram", "m", *LM, "--window", "33"], "window is 33; expected 2 to 32"),
        (["gram", "a", *CLASSIFY, "--memory", "100"], "memory"),
        (["gram", "a", *CLASSIFY, "--device", "foo"], "the device 'foo' cannot be used here"),
    ],
)
def test_impossible_requests_give_one_message(arguments: list[str], message: str) -> None:
    assert message in refusal(run("stats", *arguments))
    assert not Path("out/s.safetensors").exists() and not Path("s.safetensors").exists()


@pytest.mark.usefixtures("folder")
def test_without_transformers_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "mergekit_lfm[models]"' in refusal(run("stats", "gram", "a", *CLASSIFY))


# ------------------------------------------------------------------ inspect


@pytest.mark.usefixtures("folder")
def test_inspect_describes_a_statistics_file() -> None:
    made = run("stats", "gram", "a", *CLASSIFY, "--layers", "query")
    result = run("inspect", "out/s.safetensors")
    summary = made.stderr.splitlines()
    assert result.stdout.splitlines()[-len(summary) :] == summary
    assert any(line.startswith("gram/") for line in result.stdout.splitlines())
    assert any(line.startswith("skipped: ") and " more: " in line for line in summary)
    found = answer(run("inspect", "out/s.safetensors", "--json"))
    facts = open_statistics("out/s.safetensors").info
    assert found["statistics"]["skipped"] == facts.skipped
    assert found["statistics"]["data"] == facts.data
    assert [tensor["name"] for tensor in found["tensors"]] == list(open_checkpoint("out/s.safetensors"))
    assert "statistics" not in answer(run("inspect", "a/model.safetensors", "--json"))
    Path("out/s.safetensors").rename("renamed")  # recognised by its content, not by its name
    assert run("inspect", "renamed").stdout.splitlines()[-len(summary) :] == summary


# ------------------------------------------------------------------ processes


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(folder: Path) -> None:
    (folder / "long.txt").write_text("a document of some length, " * 120)
    command = ["stats", "fisher", "m", "--data", "long.txt", "--task", "lm", "--batch-size", "1", "-o"]
    process = start(folder, *command, "s.safetensors")
    wait_for(lambda: (folder / "s.safetensors.partial").exists())
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    kept = "s.safetensors.partial"
    assert stderr == f"interrupted: the finished part is in {kept}; run the same command again to go on\n"
    assert not (folder / "s.safetensors").exists()
    for out in ("s.safetensors", "t.safetensors"):
        assert run(*command, out, "-q").exit_code == 0
    assert (folder / "s.safetensors").read_bytes() == (folder / "t.safetensors").read_bytes()
    assert not (folder / kept).exists()


def test_the_bar_is_shown_on_a_terminal_only(folder: Path) -> None:
    printed, shown = on_a_terminal(folder, "stats", "gram", "a", *CLASSIFY)
    assert printed == "out/s.safetensors\n"
    assert b"collecting:" in shown and b"/10.0 [" in shown and b"statistics" in shown
    assert answer(run("stats", "gram", "b", *CLASSIFY, "--overwrite", "--json"))["kind"] == "gram"
    assert [path.name for path in (folder / "out").iterdir()] == ["s.safetensors"]
