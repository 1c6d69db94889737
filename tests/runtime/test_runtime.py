"""Loading models for a task: whole or not at all, from local files, and the meaning of their outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_text import bert_config, byte_tokenizer, llama_config, save_model, transformers
from safetensors.torch import load_file, save_file

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.load import embeddings, load_model, logits, run, tokenizer_for_texts
from mergekit_lfm.runtime.tasks import TASKS


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
    """Decoders read the class off the last token; without a padding token they take only one example at a time."""
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
    save_model(tmp_path / "texts", "ViTForImageClassification", config, byte_tokenizer())
    assert load_model(tmp_path / "texts", "classification").tokenizer is not None  # an unused one does no harm
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
    with pytest.raises(PlanError, match="the task 'lms'; expected lm, classification, embedding"):
        load_model(llama, "lms")


def test_without_transformers_the_message_has_the_line_that_installs_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "mergekit_lfm\[models\]"'):
        load_model(llama, "lm")


def with_settings(folder: Path, target: Path, name: str = "config.json", **settings: Any) -> Path:
    """A copy of the model with other entries in a JSON file of it."""
    change(folder, target)
    (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | settings))
    return target


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("config.json", {"model_type": "odd", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["code.T", None]}}),
    ],
)
def test_code_in_the_folder_is_not_run_nor_asked_about(
    llama: Path, tmp_path: Path, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on standard input"))
    folder = with_settings(llama, tmp_path / "a", name, **settings)
    (folder / "code.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(FormatError, match="it needs code that is in the folder, which is not run; expected"):
        load_model(folder, "lm")


def test_code_beside_an_architecture_that_is_known_is_ignored(llama: Path, tmp_path: Path) -> None:
    folder = with_settings(llama, tmp_path / "a", auto_map={"AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text("raise SystemExit('the code was run')")
    assert type(load_model(folder, "lm").model).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "nope"}, "model type `nope`"),
        ({"hidden_size": "x"}, "Validation error for field 'hidden_size'"),
        ({"hidden_act": "zzz"}, "KeyError: 'zzz'"),
    ],
)
def test_a_config_that_makes_no_model_is_one_message(
    llama: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FormatError, match=f"found no causal language model that can be loaded: .*{reason}"):
        load_model(with_settings(llama, tmp_path / "a", **settings), "lm")


def t5(folder: Path) -> Path:
    config = transformers.T5Config(
        vocab_size=258, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return save_model(folder, "T5ForConditionalGeneration", config, byte_tokenizer())


@pytest.mark.parametrize("task", ["lm", "embedding"])
def test_an_encoder_with_a_decoder_neither_embeds_nor_predicts(tmp_path: Path, task: str) -> None:
    with pytest.raises(
        PlanError, match=f"T5ForConditionalGeneration, does not fit the task {task!r}: its decoder needs inputs"
    ):
        load_model(t5(tmp_path / "t5"), task)


def test_a_model_of_images_is_not_a_language_model(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(FormatError, match=r"Unrecognized configuration class .*ViTConfig") as raised:
        load_model(save_model(tmp_path / "v", "ViTForImageClassification", config), "lm")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_looks_ahead_is_not_a_language_model(tmp_path: Path, dtype: str) -> None:
    ahead = save_model(tmp_path / "a", "BertLMHeadModel", bert_config())
    with pytest.raises(PlanError, match="BertLMHeadModel, is not a causal language model: its scores of a token"):
        load_model(ahead, "lm", dtype=dtype)
    behind = save_model(tmp_path / "b", "BertLMHeadModel", bert_config(is_decoder=True))
    assert load_model(behind, "lm", dtype=dtype).task == "lm"


def test_a_limit_below_one_is_none(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=258, d_model=8, n_layer=1, n_head=2, d_inner=8)
    save_model(tmp_path, "XLNetForSequenceClassification", config)
    loaded = load_model(tmp_path, "classification")
    assert (loaded.model.config.max_position_embeddings, loaded.positions) == (-1, None)  # type: ignore[union-attr]


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused_before_loading(tmp_path: Path, device: str) -> None:
    with pytest.raises(PlanError, match=f"the device '{device}' c.*expected one like cpu"):
        load_model(tmp_path, "lm", device=device)


@pytest.mark.parametrize("dtype", ["float23", "int8", "nn"])
def test_a_dtype_to_compute_in_is_one_of_torch(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(PlanError, match=f"the dtype '{dtype}'"):
        load_model(tmp_path, "lm", dtype=dtype)


# ------------------------------------------------------------------ running


def test_inputs_that_a_model_does_not_take_are_named_with_those_it_takes(llama: Path) -> None:
    model = load_model(llama, "lm").model
    with pytest.raises(PlanError) as raised:
        run(model, kwargs={"pixel_values": torch.ones(1, 3, 8, 8)})
    message = str(raised.value)
    assert message.startswith("LlamaForCausalLM failed on pixel_values float32 [1, 3, 8, 8] (")
    assert "the inputs of its forward: input_ids, attention_mask, " in message and "\n" not in message
    with pytest.raises(PlanError, match=r"failed on input 0 int64 \[1, 1\] \(IndexError: "):
        run(model, (torch.tensor([[300]]),))
    assert torch.equal(run(torch.nn.Identity(), (torch.ones(2),)), torch.ones(2))


def test_the_statements_of_a_module_are_left_as_they_are() -> None:
    class Refusing(torch.nn.Module):
        def forward(self) -> None:
            raise FormatError("its own words")

    with pytest.raises(FormatError, match=r"^its own words$"):
        run(Refusing())


# ------------------------------------------------------------------ outputs


def test_embeddings_are_unit_means_over_the_tokens() -> None:
    states = torch.tensor([[[1.0, 2.0], [5.0, 6.0]], [[0.0, -2.0], [0.0, 0.0]]])
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    for output in (states, (states, None), SimpleNamespace(last_hidden_state=states)):
        torch.testing.assert_close(embeddings(output), expected)
    assert torch.equal(embeddings(states[:, 0]), states[:, 0])


def test_logits_are_found_in_any_output_of_a_model() -> None:
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
