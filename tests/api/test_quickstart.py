"""The quick start: its files, the worth of its merge on held-out text, and the script that makes its models."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Expected, assert_close, doubles
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.judge.evaluate import Perplexity, perplexity
from mergekit_lfm.runtime.load import load_model

transformers = pytest.importorskip("transformers")

RECIPES = Path(__file__).parents[2] / "recipes"
QUICKSTART = RECIPES / "quickstart"
MODELS, DOMAINS = ("base", "docs", "code"), ("docs", "code")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(merge(RECIPES / "quickstart.yaml", tmp_path_factory.mktemp("quickstart") / "merged", threads=1))


@pytest.fixture(scope="module")
def measured(merged: Path) -> dict[str, dict[str, Perplexity]]:
    """Every model on every text."""
    texts = {domain: (QUICKSTART / f"{domain}.txt").read_text("utf-8") for domain in DOMAINS}
    loaded = {name: load_model(QUICKSTART / name, "lm") for name in MODELS} | {"merged": load_model(merged, "lm")}
    return {name: {domain: perplexity(model, text) for domain, text in texts.items()} for name, model in loaded.items()}


def mean(results: dict[str, Perplexity]) -> float:
    return sum(result.bits_per_byte for result in results.values()) / len(results)


def test_the_merge_is_better_on_average_than_the_base_and_than_either_parent(
    measured: dict[str, dict[str, Perplexity]],
) -> None:
    best = min(mean(measured[name]) for name in MODELS)
    assert mean(measured["merged"]) < best - 0.05


def test_each_parent_is_the_best_of_all_in_its_own_domain(measured: dict[str, dict[str, Perplexity]]) -> None:
    for domain in DOMAINS:
        assert min(measured, key=lambda name: measured[name][domain].bits_per_byte) == domain


def test_the_table_beside_the_checkpoints_is_true(measured: dict[str, dict[str, Perplexity]]) -> None:
    rows = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| \**([\d.]+)\** \|$", (QUICKSTART / "README.md").read_text("utf-8"), re.M
    )
    assert [row[0] for row in rows] == [*MODELS, "merged"]
    for name, docs, code, both in rows:
        found = measured[name]
        assert [float(docs), float(code), float(both)] == pytest.approx(
            [found["docs"].bits_per_byte, found["code"].bits_per_byte, mean(found)], abs=5e-4
        )


def test_the_merge_is_the_mean_of_the_fine_tunes_in_every_tensor(merged: Path) -> None:
    base, docs, code = (load_file(QUICKSTART / name / "model.safetensors") for name in MODELS)
    result = load_file(merged / "model.safetensors")
    assert result.keys() == base.keys() == docs.keys() == code.keys()
    for name, tensor in result.items():
        assert tensor.dtype == torch.bfloat16
        start, *tuned = (doubles(tensors[name]) for tensors in (base, docs, code))
        terms = [0.5 * (x - start) for x in tuned]
        assert_close(tensor, Expected(start + sum(terms), np.max(np.abs([start, *terms]), axis=0)))


def test_the_checkpoints_are_small_and_share_a_tokenizer_that_keeps_the_text(merged: Path) -> None:
    text = (QUICKSTART / "code.txt").read_text("utf-8") + "言葉 \0\t\n\n"
    ids = []
    for folder in (*(QUICKSTART / name for name in MODELS), merged):
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 1_500_000
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids.append(tokenizer(text, verbose=False)["input_ids"])
        assert tokenizer.decode(ids[-1]) == text
    assert ids[0] == ids[1] == ids[2] == ids[3]


def test_the_merged_model_writes_text(merged: Path) -> None:
    loaded: Any = load_model(merged, "lm")
    prompt = loaded.tokenizer("<s>Returns the", return_tensors="pt")
    written = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert written.shape == (1, prompt["input_ids"].shape[1] + 8)


@pytest.mark.slow
def test_the_script_makes_models_from_texts_that_have_nothing_of_the_held_out_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = import_module("recipes.make.quickstart")

    corpus = script.make_corpus()
    known = {line for texts in corpus.held_out.values() for text in texts for line in script.paragraphs(text)}
    read = {
        line for texts in (corpus.base, *corpus.tune.values()) for text in texts for line in script.paragraphs(text)
    }
    assert len(known) > 200
    assert len(read) > 10_000
    assert not known & read

    monkeypatch.setattr(script, "BASE_STEPS", 2)
    monkeypatch.setattr(script, "TUNE_STEPS", 1)
    monkeypatch.setattr(script, "make_corpus", lambda: corpus)
    monkeypatch.setattr("sys.argv", ["quickstart.py", str(tmp_path)])
    script.main()
    base, docs, code = (load_file(tmp_path / name / "model.safetensors") for name in MODELS)
    for tuned in (docs, code):
        assert any(not torch.equal(tensor, base[name]) for name, tensor in tuned.items())
    for domain in DOMAINS:
        text = (tmp_path / f"{domain}.txt").read_text("utf-8")
        assert perplexity(tmp_path / domain, text[:2000]).bits_per_byte < 8
