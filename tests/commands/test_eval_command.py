"""`mergekit-lfm eval`: the judges of each kind of model, as a table and as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_commands import answer, refusal, run
from helpers_text import bert_config, byte_tokenizer, llama_config, save_model, write_lines

from mergekit_lfm.judge import evaluate
from mergekit_lfm.judge.evaluate import Perplexity
from mergekit_lfm.runtime import load as runtime


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake_perplexity(model: str, text: str, *, window: int | None, stride: int | None) -> Perplexity:
    """One bit per byte and token for model a; for others twice that, or infinity if there is a window."""
    del stride
    factor = 1.0 if model == "a" else 2.0 if window is None else float("inf")
    bits = len(text) * factor
    return Perplexity(len(text), len(text), bits * 0.6931471805599453, 2.0**factor, factor)


@pytest.fixture
def judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`eval` of models a and b on two texts, with known numbers."""
    monkeypatch.setattr(runtime, "load_model", lambda path, _task, device: str(path) if device == "cpu" else device)
    monkeypatch.setattr(evaluate, "perplexity", fake_perplexity)
    for name, text in (("x.txt", "abc"), ("y.txt", "abcdefgh")):
        (folder / name).write_text(text)
    return ["eval", "a", "b", "--text", "x.txt", "--text", "y.txt"]


def test_eval_prints_a_row_for_each_model_and_text_and_the_means(judged: list[str]) -> None:
    assert [line.split() for line in run(*judged).stdout.splitlines()] == [
        ["model", "text", "tokens", "perplexity", "bits/byte"],
        ["a", "x.txt", "3", "2", "1.0000"],
        ["a", "y.txt", "8", "2", "1.0000"],
        ["a", "mean", "2", "1.0000"],
        ["b", "x.txt", "3", "4", "2.0000"],
        ["b", "y.txt", "8", "4", "2.0000"],
        ["b", "mean", "4", "2.0000"],
    ]


def test_eval_runs_models_where_it_is_asked_to(judged: list[str]) -> None:
    """The judge gets the device that `--device` names."""
    rows = run(*judged, "--device", "a").stdout.splitlines()
    assert [line.split()[-2:] for line in rows[1:3]] == [["2", "1.0000"]] * 2
    assert rows[4:6] == [line.replace("a", "b", 1) for line in rows[1:3]]


def test_eval_on_a_device_that_is_not_there(folder: Path) -> None:
    save_model(folder / "a", "LlamaForCausalLM", llama_config())
    byte_tokenizer().save_pretrained(folder / "a")
    (folder / "x.txt").write_text("abc")
    (folder / "f.yaml").write_text("facts: [{prompt: '{} is', subject: A, target_new: b, target_true: c}]\n")
    for given in (["--text", "x.txt"], ["--facts", "f.yaml"]):
        assert "the device 'cuda:99' cannot be used here" in refusal(run("eval", "a", *given, "--device", "cuda:99"))


def test_eval_as_json_has_null_for_infinity(judged: list[str]) -> None:
    first, second = answer(run(*judged, "--json", "--window", "8"))["models"]
    assert (first["model"], first["mean"]["bits_per_byte"]) == ("a", 1.0)
    assert first["mean"]["perplexity"] == pytest.approx(2.0)
    assert [text["tokens"] for text in second["texts"]] == [3, 8]
    assert second["mean"] == {"perplexity": None, "bits_per_byte": None}


def test_eval_of_a_file_that_is_not_text(judged: list[str]) -> None:
    Path("x.txt").write_bytes(b"\xff\xfe")
    assert "x.txt" in refusal(run(*judged))


def test_eval_without_transformers_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (folder / "x.txt").write_text("abc")
    assert 'pip install "mergekit_lfm[models]"' in refusal(run("eval", "a", "--text", "x.txt"))


def models_of_texts(folder: Path) -> None:
    """A random classifier c of two classes, a random encoder e, and x.jsonl with data for both."""
    save_model(folder / "c", "BertForSequenceClassification", bert_config(), byte_tokenizer(special=True))
    write_lines(folder / "x.jsonl", *({"text": "abcd"[i], "label": i % 2, "positive": "abcd"[i]} for i in range(4)))
    save_model(folder / "e", "BertModel", bert_config(), byte_tokenizer(special=True))


def test_eval_of_classifiers(folder: Path) -> None:
    models_of_texts(folder)
    expected = evaluate.accuracy("c", "x.jsonl")
    rows = [
        line.split() for line in run("eval", "c", "--data", "x.jsonl", "--task", "classification").stdout.splitlines()
    ]
    assert rows == [
        ["model", "file", "examples", "correct", "accuracy"],
        ["c", "x.jsonl", "4", str(expected.correct), f"{expected.accuracy:.4f}"],
    ]
    write_lines(folder / "y.jsonl", {"text": "a", "label": 0}, {"text": "a", "label": 1})  # one of them is right
    both = ["eval", "c", "--data", "x.jsonl", "--data", "y.jsonl", "--task", "classification"]
    (found,) = answer(run(*both, "--json"))["models"]
    assert [(file["file"], file["accuracy"]) for file in found["files"]] == [
        ("x.jsonl", expected.accuracy),
        ("y.jsonl", 0.5),
    ]
    assert found["mean"] == {"accuracy": (expected.accuracy + 0.5) / 2}
    assert run(*both).stdout.splitlines()[-1].split()[:2] == ["c", "mean"]


def test_eval_of_encoders(folder: Path) -> None:
    models_of_texts(folder)
    rows = [line.split() for line in run("eval", "e", "--data", "x.jsonl", "--task", "embedding").stdout.splitlines()]
    assert rows == [["model", "file", "pairs", "top-1", "MRR"], ["e", "x.jsonl", "4", "1.0000", "1.0000"]]


def test_eval_of_a_text_as_data_is_eval_of_the_text(folder: Path) -> None:
    save_model(folder / "m", "LlamaForCausalLM", llama_config(), byte_tokenizer())
    (folder / "x.txt").write_text("a text\n")
    write_lines(folder / "x.jsonl", {"text": "a text\n"})
    by_text = answer(run("eval", "m", "--text", "x.txt", "--json", "--stride", "3"))["models"]
    for name in ("x.txt", "x.jsonl"):
        (found,) = answer(run("eval", "m", "--data", name, "--task", "lm", "--json", "--stride", "3"))["models"]
        assert found["texts"] == [by_text[0]["texts"][0] | {"text": name}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --text FILE, or --data FILE with --task"),
        (["--text", "x", "--data", "x", "--task", "lm"], "Give --text FILE, or --data"),
        (["--data", "x"], "Give --task with --data"),
        (["--text", "x", "--task", "embedding"], "--text is for language models"),
        (["--data", "x", "--task", "embedding", "--stride", "2"], "--stride is for language models"),
    ],
)
def test_eval_of_options_that_do_not_go_together(options: list[str], message: str) -> None:
    result = run("eval", "a", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_eval_of_data_that_the_model_does_not_take(folder: Path) -> None:
    models_of_texts(folder)
    np.savez("x.npz", pixel_values=np.ones((2, 3, 4, 4), np.float32), labels=np.arange(2))
    message = refusal(run("eval", "c", "--data", "x.npz", "--task", "classification"))
    assert "failed on pixel_values float32 [2, 3, 4, 4]" in message and "inputs of its forward: input_ids" in message
