"""The tables of tied tensors against the classes and configs of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import transformers
import transformers.models
from transformers import CONFIG_MAPPING

from mergekit_lfm.arch.ties import is_tied, tied_names

# Module lists and whole stacks that transformers ties by patterns: files hold them under one name.
PATTERNS = re.compile(r"[\\^(]|embed$|head$")


def tied_pairs(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """(tied, source) of a model class, as transformers names its tensors."""
    keys = getattr(kind, "_tied_weights_keys", None)
    for tied, source in keys.items() if isinstance(keys, dict) else ():
        if not PATTERNS.search(tied):
            yield tied, source.removesuffix("$")


COMMON = (
    "LlamaForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM BertForMaskedLM BertForPreTraining RobertaForMaskedLM "
    "T5ForConditionalGeneration BartForConditionalGeneration BartModel WhisperForConditionalGeneration "
    "MambaForCausalLM ElectraForMaskedLM DistilBertForMaskedLM BloomForCausalLM Qwen2VLForConditionalGeneration"
)


@pytest.mark.parametrize("name", COMMON.split())
def test_the_tied_tensors_of_a_class_are_in_the_table(name: str) -> None:
    pairs = list(tied_pairs(getattr(transformers, name)))
    assert pairs
    for tied, source in pairs:
        assert [set(group) for group in tied_names([tied, source, "other.weight"])] == [{tied, source}], (tied, source)
        assert tied_names([tied, "other.weight"]) == []


@pytest.mark.slow
def test_the_tied_tensors_of_all_classes_are_in_the_table() -> None:
    seen = 0
    for package in iter_modules(transformers.models.__path__):
        folder = import_module(f"transformers.models.{package.name}")
        for module in (each.name for each in iter_modules(folder.__path__) if each.name.startswith("modeling_")):
            try:
                kinds = vars(import_module(f"{folder.__name__}.{module}"))
            except ImportError:  # of a package that this machine lacks
                continue
            for kind in (
                kind for kind in kinds.values() if isinstance(kind, type) and kind.__module__.endswith(module)
            ):
                for tied, source in tied_pairs(kind):
                    if tied.endswith((".weight", ".bias", "embedding")):
                        seen += 1
                        assert tied_names([tied, source]), (kind.__name__, tied, source)
    assert seen > 300


def test_a_source_comes_before_tensors_tied_to_it() -> None:
    names = [
        "lm_head.weight",
        "model.shared.weight",
        "model.decoder.embed_tokens.weight",
        "model.encoder.embed_tokens.weight",
    ]
    (group,) = tied_names(names)
    assert set(group) == set(names) and group[0] == "model.shared.weight"
    assert tied_names(["lm_head.weight", "vision.embed_tokens.weight"]) == []


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "qwen2", "gemma2", "bert", "t5", "mistral", "whisper", "phi3", "mamba"]
)
def test_a_config_without_the_key_ties_as_its_class_does(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    assert is_tied({"model_type": kind}) == config.tie_word_embeddings
    for stated in (True, False):
        assert is_tied({"model_type": kind, "tie_word_embeddings": stated}) == stated
        assert is_tied({"model_type": kind, "text_config": {"tie_word_embeddings": stated}}) == stated
    assert is_tied({}) is None


@pytest.mark.slow
def test_all_configs_without_the_key_tie_as_their_classes_do() -> None:
    wrong = []
    for kind in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:
            continue
        stated = getattr(config, "tie_word_embeddings", None)
        if stated is not None and is_tied({"model_type": kind}) != stated:
            wrong.append(kind)
    assert wrong == []
