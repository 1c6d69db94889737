"""Loading models for a task: whole or not at all, from local files, and what their outputs are read as."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_text import bert_config, byte_tokenizer, llama_config, save_model, transformers
from safetensors.torch import load_file, save_file

from mergekit_lfm.commands.options import TASKS as OFFERED
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime import TASKS, embeddings, load_model, logits, tokenizer_for_texts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", llama_config(), byte_tokenizer())


def change(folder: Path, target: Path, *, without: str = "", **tensors: torch.Tensor) -> Path:
    """A copy of the model with other tensors, and without those whose name starts with `without`."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    found = load_file(target / "model.safetensors") | tensors
    kept = {name: x for name, x in found.items() if not without or not name.startswith(without)}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def test_the_command_line_offers_the_tasks_there_are() -> None:
    assert tuple(TASKS) == OFFERED


def test_a_language_model_comes_with_its_tokenizer_and_checkpoint(llama: Path) -> None:
    loaded = load_model(llama, "lm")
    assert type(loaded.model).__name__ == "LlamaForCausalLM" and not loaded.model.training
    assert loaded.tokenizer is not None and loaded.tokenizer.bos_token == "<s>"
    assert (loaded.task, loaded.positions, loaded.checkpoint.path) == ("lm", 32, llama)
    stored = load_file(llama / "model.safetensors")
    assert all(torch.equal(x, stored[name]) for name, x in loaded.model.state_dict().items())


def test_a_model_is_loaded_in_float32_unless_asked_otherwise(llama: Path, tmp_path: Path) -> None:
    load_model(llama, "lm").model.bfloat16().save_pretrained(tmp_path)  # type: ignore[operator]
    dtypes = [
        next(load_model(tmp_path, "lm", dtype=d).model.parameters()).dtype for d in ("float32", "auto", "float64")
    ]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float64]
    assert load_model(tmp_path, "lm").tokenizer is None


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_classifier_of_texts_takes_batches(tmp_path: Path, kind: str) -> None:
    """Decoders read the class off the last token; without a padding token they take one example at a time only."""
    config = bert_config(num_labels=3) if kind.startswith("Bert") else llama_config(num_labels=3)
    save_model(tmp_path, kind, config, byte_tokenizer())
    loaded = load_model(tmp_path, "classification")
    assert type(loaded.model).__name__ == kind
    ids = torch.randint(258, (4, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = logits(loaded.model(input_ids=ids))
        alone = torch.cat([logits(loaded.model(input_ids=row[None])) for row in ids])
    assert together.shape == (4, 3)
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together[0], together[1])


def test_a_classifier_of_images_needs_no_tokenizer(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    save_model(tmp_path, "ViTForImageClassification", config)
    loaded = load_model(tmp_path, "classification")
    assert (type(loaded.model).__name__, loaded.tokenizer) == ("ViTForImageClassification", None)
    assert loaded.positions is None
    with pytest.raises(PlanError, match="the model has no tokenizer"):
        tokenizer_for_texts(loaded.tokenizer)


def test_an_encoder_is_loaded_without_the_head_it_was_saved_with(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a", "BertForSequenceClassification", bert_config())
    loaded = load_model(folder, "embedding")
    stored = load_file(folder / "model.safetensors")
    assert type(loaded.model).__name__ == "BertModel"
    assert torch.equal(loaded.model.state_dict()["pooler.dense.weight"], stored["bert.pooler.dense.weight"])


def test_an_encoder_saved_without_its_pooler_is_whole(tmp_path: Path) -> None:
    """The mean over tokens does not pass through it; a random one must not appear among the parameters."""
    folder = save_model(tmp_path / "a", "BertModel", bert_config())
    bare = change(folder, tmp_path / "b", without="pooler.")
    loaded = load_model(bare, "embedding")
    assert not [name for name, _ in loaded.model.named_parameters() if "pooler" in name]
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(embeddings(loaded.model(ids)), embeddings(load_model(folder, "embedding").model(ids)))


@pytest.mark.parametrize(("task", "what"), TASKS.items())
def test_a_model_with_a_tensor_missing_or_misshapen_is_refused(tmp_path: Path, task: str, what: str) -> None:
    kinds = {"lm": "BertLMHeadModel", "classification": "BertForSequenceClassification", "embedding": "BertModel"}
    folder = save_model(tmp_path / "a", kinds[task], bert_config(is_decoder=task == "lm"))
    prefix = "" if task == "embedding" else "bert."
    wrong = {f"{prefix}encoder.layer.0.output.LayerNorm.weight": torch.ones(8)}
    other = change(folder, tmp_path / "b", without=f"{prefix}encoder.layer.0.attention.self.query.", **wrong)
    with pytest.raises(FormatError) as raised:
        load_model(other, task)
    assert f"the files do not hold the {what} that its config.json describes" in str(raised.value)
    assert "attention.self.query.weight: not in the files" in str(raised.value)
    assert "output.LayerNorm.weight: of another shape" in str(raised.value)


def test_a_path_without_a_model_is_refused_and_nothing_is_looked_up(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gpt2: found no config\.json there"):
        load_model(tmp_path / "gpt2", "lm")


def test_an_unknown_task_is_refused(llama: Path) -> None:
    with pytest.raises(PlanError, match="no task 'lms'; expected lm, classification, embedding"):
        load_model(llama, "lms")


def test_without_transformers_the_message_has_the_line_that_installs_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "mergekit_lfm\[models\]"'):
        load_model(llama, "lm")


# ------------------------------------------------------------------ outputs


def test_embeddings_are_unit_means_over_the_tokens() -> None:
    states = torch.tensor([[[1.0, 2.0], [5.0, 6.0]], [[0.0, -2.0], [0.0, 0.0]]])
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    for output in (states, (states, None), SimpleNamespace(last_hidden_state=states)):
        torch.testing.assert_close(embeddings(output), expected)
    assert torch.equal(embeddings(states[:, 0]), states[:, 0])


def test_logits_are_found_in_what_a_model_returns() -> None:
    scores = torch.ones(2, 3)
    assert all(logits(output) is scores for output in (scores, (scores, None), SimpleNamespace(logits=scores)))


@pytest.mark.parametrize("read", [logits, embeddings])
def test_an_output_without_them_is_refused(read: object) -> None:
    assert callable(read)
    with pytest.raises(PlanError, match="the model returned a dict; expected"):
        read({"a": 1})


def test_embeddings_of_images_in_channels_are_refused() -> None:
    with pytest.raises(PlanError, match=r"states of shape \[1, 2, 3, 4\]; expected"):
        embeddings(torch.ones(1, 2, 3, 4))
