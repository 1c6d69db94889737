"""Routing of texts to experts: vectors against scikit-learn's, scores against those of the experts on their parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_tune import save_tiny, tiny  # noqa: F401
from sklearn.feature_extraction.text import TfidfVectorizer

from mergekit_lfm import PlanError, accuracy, evaluate_models, evaluate_routed, load_model, perplexity
from mergekit_lfm.judge.route import Router, read_texts

SEA = ["The ship sails on the sea.", "A sailor, a ship and a mast.", "Waves carry the small boat."]
SKY = ["The bird flies in the sky.", "Clouds and a flying bird at noon.", "An a", "Wings carry the small bird."]
NEW = ["A boat with a broken mast", "two birds above the clouds", "sailing ships", "noon", "qqq", ""]


def write(path: str, lines: list[dict[str, object]]) -> str:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    for name in ("llama", "tied", "bert"):
        shutil.copytree(tiny / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    write("sea.jsonl", [{"text": text} for text in SEA])
    write("sky.jsonl", [{"prompt": text, "completion": ""} for text in SKY])
    write("new.jsonl", [{"text": text, "label": i % 3} for i, text in enumerate(NEW) if text])
    return tmp_path


def test_experts_are_means_of_the_vectors_of_scikit_learn() -> None:
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    vectors = vectorizer.fit_transform([*SEA, *SKY]).toarray()
    names = vectorizer.get_feature_names_out()
    means = np.stack([vectors[: len(SEA)].mean(0), vectors[len(SEA) :].mean(0)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    router = Router([SEA, SKY])
    for mean, expert in zip(means, router.experts, strict=True):
        assert {name for name, x in zip(names, mean, strict=True) if x} == expert.keys()
        assert np.allclose([expert.get(name, 0.0) for name in names], mean, atol=1e-12)
    nearest = (vectorizer.transform(NEW).toarray() @ means.T).argmax(1)
    assert [router.choose(text) for text in NEW] == nearest.tolist() == [0, 1, 0, 1, 0, 0]


@pytest.mark.usefixtures("here")
def test_a_file_is_scored_by_the_experts_on_their_parts() -> None:
    routed = evaluate_routed({"llama": "sea.jsonl", "tied": ["sky.jsonl"]}, "new.jsonl").result
    assert routed.chosen == {"new.jsonl": {"llama": 3, "tied": 2}}
    parts = [perplexity("llama", [NEW[0], NEW[2], NEW[4]]), perplexity("tied", [NEW[1], NEW[3]])]
    score = routed.scores["new.jsonl"]
    assert score.nll == pytest.approx(sum(part.nll for part in parts))  # type: ignore[union-attr]
    assert score.perplexity == pytest.approx(  # type: ignore[union-attr]
        np.exp(sum(part.nll for part in parts) / sum(part.tokens for part in parts))
    )
    shutil.copytree("llama", "twin")
    same = evaluate_routed({"llama": "sea.jsonl", "twin": "sky.jsonl"}, "new.jsonl").result.scores["new.jsonl"]
    whole = evaluate_models("llama", data="new.jsonl", task="lm").result["llama"]["new.jsonl"]
    assert (same.tokens, same.bytes) == (whole.tokens, whole.bytes)  # type: ignore[union-attr]
    assert same.bits_per_byte == pytest.approx(whole.bits_per_byte)  # type: ignore[union-attr]


def test_an_encoder_chooses_the_nearest_mean(here: Path, tiny: Path) -> None:  # noqa: F811
    encoder = load_model(tiny / "encoder", "embedding")
    assert encoder.tokenizer is not None

    def embed(text: str) -> torch.Tensor:
        ids = encoder.tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[misc]
        with torch.no_grad():
            states: torch.Tensor = encoder.model(input_ids=ids).last_hidden_state[0].double().mean(0)
        unit: torch.Tensor = states / states.norm()
        return unit

    sea, sky = (torch.stack([embed(text) for text in own]).mean(0) for own in (SEA, SKY))
    nearest = [bool(embed(text) @ (sky / sky.norm() - sea / sea.norm()) > 0) for text in NEW if text]
    assert 0 < sum(nearest) < 5
    how = ("--expert", "llama=sea.jsonl", "--expert", "tied=sky.jsonl", "--data", "new.jsonl", "--task", "lm")
    data = answer(run("eval", *how, "--router", str(tiny / "encoder"), "--json"))
    assert here and data["chosen"]["new.jsonl"] == {"llama": 5 - sum(nearest), "tied": sum(nearest)}


@pytest.mark.usefixtures("here")
def test_classifiers_are_right_as_often_as_on_their_parts() -> None:
    save_tiny("bert", Path("other"))
    routed = evaluate_routed({"bert": "sea.jsonl", "other": "sky.jsonl"}, "new.jsonl", task="classification").result
    score, whole = routed.scores["new.jsonl"], accuracy("bert", "new.jsonl")
    assert score == whole and sum(routed.chosen["new.jsonl"].values()) == whole.examples == 5


@pytest.mark.usefixtures("here")
def test_eval_has_a_row_for_experts_together() -> None:
    how = ("--expert", "llama=sea.jsonl", "--expert", "tied=sky.jsonl", "--data", "new.jsonl", "--task", "lm")
    rows = [line.split() for line in run("eval", "llama", *how).stdout.splitlines()]
    assert [row[0] for row in rows] == ["model", "llama", "routed", "new.jsonl:"]
    assert rows[-1][1:] == ["3", "to", "llama,", "2", "to", "tied"]
    data = answer(run("eval", *how, "--json"))
    assert [each["model"] for each in data["models"]] == ["routed"]
    assert data["chosen"] == {"new.jsonl": {"llama": 3, "tied": 2}}


@pytest.mark.usefixtures("here")
def test_experts_that_cannot_be_chosen_from_are_refused() -> None:
    data = ("--data", "new.jsonl", "--task", "lm")
    for arguments, message in (
        (("--expert", "llama=sea.jsonl"), "found 1 expert; expected two or more"),
        (("--expert", "llama"), "expected MODEL=FILE"),
        ((), "--expert MODEL=FILE"),
    ):
        found = run("eval", *arguments, *data)
        assert found.exit_code == 2 and message in found.stderr
    write("bad.jsonl", [{"label": 1}])
    assert "bad.jsonl" in refusal(run("eval", "--expert", "llama=bad.jsonl", "--expert", "tied=sea.jsonl", *data))
    with pytest.raises(PlanError, match="expected lm or classification"):
        evaluate_routed({"a": "sea.jsonl", "b": "sky.jsonl"}, "new.jsonl", task="embedding")


def test_texts_of_conversations_are_all_that_is_said(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert read_texts(tmp_path / "x.jsonl") == ["Where?\nThere."]
