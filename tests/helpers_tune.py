"""Tiny saved models with tokenizers, and data to tune them on."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_editing import LLAMA, TEXTS, trained_tokenizer

from mergekit_lfm.api.recipes import run_recipe
from mergekit_lfm.recipe.source import RecipeText

transformers = pytest.importorskip("transformers")

BERT = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}
TASKS = {"llama": "lm", "tied": "lm", "bert": "classification", "encoder": "embedding"}


def save_tiny(kind: str, folder: Path) -> Path:
    """A model of random weights with its tokenizer: a Llama (tied or not), a BERT for three classes, or an encoder."""
    torch.manual_seed(3)
    made: Any
    if kind in ("llama", "tied"):
        config = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": kind == "tied"}
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    elif kind == "bert":
        made = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))
    else:
        made = transformers.BertModel(transformers.BertConfig(**BERT))
    with torch.no_grad():
        for name, x in made.named_parameters():
            if name.endswith("bias"):
                x.normal_(0, 0.1)
    made.save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


def write_data(kind: str, file: Path) -> Path:
    """Sixteen examples for a model."""
    words = [text for line in TEXTS for text in line.split(" . ")] * 4
    lines: list[dict[str, Any]]
    if kind in ("llama", "tied"):
        lines = [{"text": word} for word in words[:16]]
    elif kind == "bert":
        lines = [{"text": word, "label": number % 3} for number, word in enumerate(words[:16])]
    else:
        lines = [{"text": word, "positive": " ".join(reversed(word.split()))} for word in words[:16]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


RULES: dict[str, Any] = {
    "template": "{text} . The [MASK] is [MASK] .",
    "classes": [["baker", "born"], ["baker", "works"], ["city", "works"]],
}
PEOPLE = ("Ada Blake", "Leo Wagner", "Mia Stone")  # the class of a text is whom it is about
SAID = ("works as a baker", "speaks Danish", "was born in Rome", "is good", "was born in New York", "said it", "rained")


@pytest.fixture(scope="session")
def masked(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder with `masked`, a BERT of random weights that predicts masked tokens, with its data.

    Texts of three classes, `a.jsonl`, others, `b.jsonl`, and a template with the words that make a class, `rules.yaml`.
    """

    def make(folder: Path) -> None:
        tokenizer = copy.deepcopy(trained_tokenizer("ended"))
        tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
        torch.manual_seed(3)
        config = transformers.BertConfig(**{**BERT, "vocab_size": 344, "initializer_range": 0.2})
        transformers.BertForMaskedLM(config).save_pretrained(folder / "masked")
        tokenizer.save_pretrained(folder / "masked")
        for name, said in (("a", SAID[:5]), ("b", SAID[5:])):
            lines = [{"text": f"{who} {it}", "label": i} for i, who in enumerate(PEOPLE) for it in said]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "rules.yaml").write_text(json.dumps(RULES))

    return made_once("tiny-masked", make)


@pytest.fixture(scope="session")
def tiny(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder with the models, by their kinds, and for each its data, KIND.jsonl."""

    def make(folder: Path) -> None:
        for kind in TASKS:
            save_tiny(kind, folder / kind)
            write_data(kind, folder / f"{kind}.jsonl")

    return made_once("tiny-tuned", make)


def interrupt(monkeypatch: pytest.MonkeyPatch, source: type) -> list[int]:
    """Have Ctrl-C come once, as a source of batches makes its second one; the first number of each batch from then on.

    The step is ended, and its state saved.
    """
    drawn, draw = list[int](), source.batch  # type: ignore[attr-defined]

    def interrupted(self: object, numbers: list[int], draw_: int = 0) -> dict[str, torch.Tensor]:
        drawn.append(numbers[0])
        if len(drawn) == 2:
            signal.raise_signal(signal.SIGINT)
        batch: dict[str, torch.Tensor] = draw(self, numbers, draw_)
        return batch

    monkeypatch.setattr(source, "batch", interrupted)
    return drawn


def bits_of(recipe: str, place: Path, steps: Mapping[int, int]) -> list[float]:
    """The bits per byte of each model that a recipe of this repository judges, summed over its data.

    place: a folder for the result. steps: fewer of them, by those of the recipe.
    """
    recipes = Path(__file__).parents[1] / "recipes"
    text = (recipes / recipe).read_text()
    for before, after in steps.items():
        assert f"steps: {before}\n" in text
        text = text.replace(f"steps: {before}\n", f"steps: {after}\n")
    run_recipe(RecipeText(text, recipes), place / "scores.json", threads=1)
    scores = json.loads((place / "scores.json").read_text())["scores"].values()
    return [sum(each["bits_per_byte"] for each in model.values()) for model in scores]
