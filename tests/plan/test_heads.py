"""Models with different heads, or with and without one: their trunks are merged, the head is the base's or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_commands import answer, run
from helpers_merges import Tensors, load_all, write_recipe
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.arch.heads import HEAD, POOLER, trunk_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

TEXT: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 32}
IMAGE: dict[str, Any] = {key: value for key, value in TEXT.items() if key not in ("vocab_size",)}
IMAGE |= {"image_size": 8, "patch_size": 4}

# The class of the base, that of the other model with its labels, and the class of the trunk.
CASES = {
    "BERT, two heads": ("BertForSequenceClassification", ("BertForSequenceClassification", 5), "BertModel"),
    "BERT, one head": ("BertForSequenceClassification", ("BertModel", 2), "BertModel"),
    "BERT, head of the other": ("BertModel", ("BertForTokenClassification", 3), "BertModel"),
    "RoBERTa, prefix": ("RobertaForSequenceClassification", ("RobertaModel", 2), "RobertaModel"),
    "RoBERTa, no prefix": ("RobertaModel", ("RobertaForSequenceClassification", 3), "RobertaModel"),
    "RoBERTa, two heads": ("RobertaForMaskedLM", ("RobertaForSequenceClassification", 4), "RobertaModel"),
    "ViT, two heads": ("ViTForImageClassification", ("ViTForImageClassification", 7), "ViTModel"),
    "ViT, one head": ("ViTForImageClassification", ("ViTModel", 2), "ViTModel"),
}


def save(kind: str, folder: Path, seed: int, labels: int = 2) -> Any:
    model = getattr(transformers, kind)
    torch.manual_seed(seed)
    config = model.config_class(**(IMAGE if kind.startswith("ViT") else TEXT), num_labels=labels)
    made = model(config).eval()
    made.save_pretrained(folder)
    return made


def recipe_of(tmp_path: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(tmp_path / name), "parameters": {"weight": w}} for name, w in (("a", 1), ("b", 3))]
    return {"merge_method": "linear", "models": models, **more}


def trunk(model: Any) -> Tensors:
    """The tensors of a model's trunk, by structure: those under the class's prefix, without it."""
    prefix = f"{model.base_model_prefix}."
    state: Tensors = model.state_dict()
    inside = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    return inside or state


@pytest.mark.parametrize("heads", ["base", "drop"])
@pytest.mark.parametrize("case", CASES)
def test_trunks_are_merged(case: str, heads: str, tmp_path: Path) -> None:
    first, (second, labels), plain = CASES[case]
    a, b = save(first, tmp_path / "a", 0), save(second, tmp_path / "b", 1, labels)
    with pytest.raises(PlanError, match=r"add `heads: base` to the recipe .* or `heads: drop` .*`--heads`"):
        make_plan(Recipe.parse(recipe_of(tmp_path)))
    recipe = recipe_of(tmp_path, heads=heads)
    out = Path(merge(recipe, tmp_path / "out"))
    kind = first if heads == "base" else plain
    model, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True, local_files_only=True)
    lone = {name for name in trunk(a).keys() ^ trunk(b).keys() if name.startswith("pooler.")}
    assert info["unexpected_keys"] == info["mismatched_keys"] == set()
    assert {name for name in info["missing_keys"] if "pooler." not in name} == set()
    merged, mine, theirs = trunk(model), trunk(a), trunk(b)
    for name in mine.keys() & theirs.keys():
        expected = (mine[name].double() + 3 * theirs[name].double()) / 4
        torch.testing.assert_close(merged[name].double(), expected, rtol=2e-7, atol=2e-7)
    assert mine.keys() ^ theirs.keys() == lone
    check_head(heads, a, out)
    dropped = {(model, tensor) for model, tensor, _ in make_plan(Recipe.parse(recipe)).dropped}
    own = {str(tmp_path / name) for name in ("a", "b") if any(map(HEAD.search, load_all(tmp_path / name)))}
    left = own if heads == "drop" else own - {str(tmp_path / "a")}
    assert {label for label, tensor in dropped if HEAD.search(tensor)} == left


def check_head(heads: str, base: Any, out: Path) -> None:
    """The head is that of the base; or no tensor is a head's, and no entry of the config is about one."""
    written, config = load_all(out), json.loads((out / "config.json").read_text())
    mine = {name: x for name, x in load_all(out.parent / "a").items() if HEAD.search(name)}
    if heads == "base":
        assert {name for name in written if HEAD.search(name)} == mine.keys()
        assert all(torch.equal(written[name], x) for name, x in mine.items())
        assert config == json.loads((out.parent / "a" / "config.json").read_text())
    else:
        assert not any(HEAD.search(name) for name in written)
        assert config["architectures"] == [type(base.base_model).__name__]
        assert not config.keys() & {"id2label", "label2id", "num_labels", "problem_type"}


def test_a_pooler_of_all_models_is_merged(tmp_path: Path) -> None:
    a, b = save("BertForSequenceClassification", tmp_path / "a", 0), save("BertModel", tmp_path / "b", 1)
    written = load_all(Path(merge(recipe_of(tmp_path, heads="drop"), tmp_path / "out")))
    mine, theirs = a.bert.pooler.dense.weight, b.pooler.dense.weight
    torch.testing.assert_close(written["bert.pooler.dense.weight"], (mine + 3 * theirs) / 4)


def test_keep_goes_before_heads(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save("BertForSequenceClassification", tmp_path / name, seed, 2 + seed)
    recipe = recipe_of(tmp_path, heads="drop", keep={"classifier.": str(tmp_path / "b")})
    written = load_all(Path(merge(recipe, tmp_path / "out")))
    assert torch.equal(written["classifier.weight"], load_all(tmp_path / "b")["classifier.weight"])


def test_a_tied_head_meets_one_of_its_own(tmp_path: Path) -> None:
    """The config of the base ties its head to the embedding, that of the other model does not."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for name, tied in (("a", True), ("b", False)):
        tensors = {embedding: torch.ones(4, 3)} | ({} if tied else {head: torch.zeros(4, 3)})
        save_checkpoint(tmp_path / name, tensors, {"model_type": "llama", "tie_word_embeddings": tied})
    with pytest.raises(PlanError, match="heads: base"):
        make_plan(Recipe.parse(recipe_of(tmp_path)))
    for heads in ("base", "drop"):
        plan = make_plan(Recipe.parse(recipe_of(tmp_path, heads=heads)))
        assert [job.name for job in plan.tensors] == [embedding]
        assert [(model, tensor) for model, tensor, _ in plan.dropped] == [(str(tmp_path / "b"), head)]


def test_vocabularies_of_other_lengths_are_no_matter_of_heads(tmp_path: Path) -> None:
    for name, rows in (("a", 4), ("b", 5)):
        tensors = {name: torch.ones(rows, 3) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        save_checkpoint(tmp_path / name, tensors, {"model_type": "llama", "tie_word_embeddings": False})
    with pytest.raises(PlanError, match="`rows: crop`") as refusal:
        make_plan(Recipe.parse(recipe_of(tmp_path)))
    assert "heads" not in str(refusal.value)


def test_the_option_stands_for_the_key(tmp_path: Path) -> None:
    save("BertForSequenceClassification", tmp_path / "a", 0)
    save("BertModel", tmp_path / "b", 1)
    digest = make_plan(Recipe.parse(recipe_of(tmp_path, heads="drop"))).digest
    recipe = str(write_recipe(tmp_path, json.dumps(recipe_of(tmp_path))))
    for command in ("plan", "merge"):
        shown = run(command, recipe, str(tmp_path / "out"), "--heads", "drop", "--json")
        assert answer(shown)["digest"] == digest
    out = str(tmp_path / "out")
    assert not any(map(HEAD.search, load_all(Path(out))))
    assert answer(run("verify", out, "--against-inputs", recipe, "--heads", "drop", "--json"))["digest"] == digest


HEADED = [
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
    "DistilBertForSequenceClassification",
    "DistilBertForMaskedLM",
    "RobertaForSequenceClassification",
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "ElectraForPreTraining",
    "DebertaV2ForSequenceClassification",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPTNeoXForCausalLM",
    "OPTForSequenceClassification",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "Wav2Vec2ForSequenceClassification",
    "ResNetForImageClassification",
    "WhisperForConditionalGeneration",
    "BartForSequenceClassification",
    "AlbertForMaskedLM",
    "XLNetForSequenceClassification",
]


@pytest.mark.parametrize("kind", HEADED)
def test_a_head_stands_beside_the_trunk(kind: str) -> None:
    """By structure, in classes of transformers: all tensors outside the trunk's prefix, and none in it."""
    model_class = getattr(transformers, kind)
    config = model_class.config_class(num_labels=3)
    with torch.device("meta"):
        model = model_class(config)
    own = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    own = {name for name in own if not POOLER.search(name)}  # DeBERTa's is beside the trunk
    assert {name for name in model.state_dict() if HEAD.search(name)} == own != set()
    assert trunk_of(kind, config.model_type) == type(model.base_model).__name__


def test_the_class_of_a_language_model_in_a_larger_one() -> None:
    assert trunk_of("Gemma3ForCausalLM", "gemma3_text") == "Gemma3TextModel"
    assert trunk_of("Gemma3ForConditionalGeneration", "gemma3") == "Gemma3Model"
    assert trunk_of("LightGBM", "") is None
