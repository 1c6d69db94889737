"""Perplexity and bits per byte: against one token at a time, transformers' own loss, and cases with a known answer."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.evaluate import Perplexity, perplexity, pieces
from mergekit_lfm.runtime import LanguageModel, load_language_model

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = "Every token is predicted once, Überlänge included: ein Wort, 言葉.\n" * 2
POSITIONS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over bytes, whose predictions depend strongly on what it has read."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {entry: number for number, entry in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=POSITIONS
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.6,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder: Path) -> LanguageModel:
    return load_language_model(folder)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def one_by_one(loaded: LanguageModel, text: str, window: int, stride: int) -> float:
    """Bits of the text when the model runs once for every token, in float64."""
    model = loaded.model.double()
    tokens = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
    bits = 0.0
    for position in range(1, len(tokens)):
        piece_end = min(len(tokens) - 1, math.ceil(position / stride) * stride)
        context = tokens[max(0, piece_end - window) : position]
        with torch.no_grad():
            odds = model(torch.tensor([context])).logits[0, -1].softmax(-1)
        bits -= math.log2(odds[tokens[position]])
    model.float()
    return bits


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 8), (7, 7), (5, 1), (None, None)])
def test_agrees_with_the_model_run_once_for_every_token(
    loaded: LanguageModel, window: int | None, stride: int | None
) -> None:
    found = perplexity(loaded, TEXT, window=window, stride=stride)
    bits = one_by_one(loaded, TEXT, window or POSITIONS, stride or POSITIONS)
    assert found.tokens == found.bytes == len(TEXT.encode())
    assert found.nll == pytest.approx(bits * math.log(2), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(bits / found.bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(2 ** (bits / found.tokens), rel=1e-4)


def test_agrees_with_the_loss_of_transformers(loaded: LanguageModel) -> None:
    text = TEXT[: POSITIONS - 8]
    ids = torch.tensor([[0, *loaded.tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        loss = loaded.model(ids, labels=ids).loss.item()
    assert math.log(perplexity(loaded, text).perplexity) == pytest.approx(loss, rel=1e-5)


def test_a_model_without_an_opinion_costs_the_logarithm_of_its_vocabulary(loaded: LanguageModel) -> None:
    torch.nn.init.zeros_(loaded.model.get_output_embeddings().weight)
    found = perplexity(loaded, "Ü言")
    assert found == Perplexity(
        5, 5, pytest.approx(5 * math.log(258)), pytest.approx(258), pytest.approx(math.log2(258))
    )


def test_a_model_that_is_sure_and_wrong_has_infinite_perplexity(loaded: LanguageModel) -> None:
    weight = loaded.model.get_output_embeddings().weight
    torch.nn.init.normal_(weight, std=1e4, generator=torch.Generator().manual_seed(0))
    found = perplexity(loaded, TEXT)
    assert found.perplexity == math.inf
    assert 1000 < found.bits_per_byte < math.inf


def test_bits_per_byte_do_not_depend_on_how_the_bytes_are_cut(folder: Path, tmp_path: Path) -> None:
    """A tokenizer with one merge more has fewer tokens; models of the same text then still share the unit."""
    other = copy_of(folder, tmp_path / "pairs")
    rules = json.loads((other / "tokenizer.json").read_text("utf-8"))
    rules["model"]["vocab"] |= {"ab": 258}
    rules["model"]["merges"] = [["a", "b"]]
    (other / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
    edit_json(other / "config.json", vocab_size=259)
    tensors = load_file(other / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][-1:]])
    tensors["lm_head.weight"].zero_()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    found = perplexity(other, "abab")
    assert (found.tokens, found.bytes) == (2, 4)
    assert found.bits_per_byte == pytest.approx(2 * math.log2(259) / 4)


def test_a_folder_gives_what_the_loaded_model_gives(folder: Path, loaded: LanguageModel) -> None:
    assert perplexity(folder, TEXT) == perplexity(str(folder), TEXT) == perplexity(loaded, TEXT)


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_every_token_is_predicted_once_from_the_promised_context(count: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    found = list(pieces(count, window, stride))
    assert [token for _, first, end in found for token in range(first, end)] == list(range(count))
    for begin, first, end in found:
        assert begin <= first
        assert end - begin <= window
        for token in range(first, end):
            assert token + 1 - begin >= min(token + 1, window - stride + 1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text is empty"),
        (TEXT, {"window": POSITIONS + 1}, "window is 33; expected from 1 to 32"),
        (TEXT, {"window": 0}, "window is 0"),
        (TEXT, {"window": 8, "stride": 9}, "stride is 9; expected 1 to 8"),
        (TEXT, {"stride": 0}, "stride is 0"),
    ],
)
def test_what_cannot_be_measured_is_said(
    loaded: LanguageModel, text: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        perplexity(loaded, text, **options)


def test_without_bos_the_text_starts_after_eos(folder: Path, loaded: LanguageModel, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "eos")
    edit_json(other / "tokenizer_config.json", bos_token=None)
    first = perplexity(other, "a").nll
    with torch.no_grad():
        scores = loaded.model(torch.tensor([[1]])).logits[0, -1].log_softmax(-1)
    assert first == pytest.approx(-scores[loaded.tokenizer("a")["input_ids"][0]].item(), rel=1e-6)
    assert first != pytest.approx(perplexity(folder, "a").nll, rel=1e-3)


def test_a_tokenizer_without_a_start_token_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "bare")
    edit_json(other / "tokenizer_config.json", bos_token=None, eos_token=None)
    with pytest.raises(FormatError, match=r"neither a BOS nor an EOS.*Set bos_token in tokenizer_config\.json"):
        perplexity(other, TEXT)


def test_a_model_with_a_tensor_missing_or_misshapen_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "holes")
    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError) as raised:
        load_language_model(other)
    assert "model.layers.1.mlp.up_proj.weight: not in the files" in str(raised.value)
    assert "model.norm.weight: of another shape" in str(raised.value)


def test_a_path_without_a_model_is_refused_and_nothing_is_looked_up(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gpt2: found no config\.json there"):
        load_language_model(tmp_path / "gpt2")


def test_without_transformers_the_message_has_the_line_that_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "mergekit_lfm\[models\]"'):
        load_language_model(folder)


def test_a_model_is_loaded_in_float32_unless_asked_otherwise(folder: Path, tmp_path: Path) -> None:
    rounded = tmp_path / "bf16"
    load_language_model(folder).model.bfloat16().save_pretrained(rounded)
    load_language_model(folder).tokenizer.save_pretrained(rounded)
    assert load_language_model(rounded).model.dtype == torch.float32
    assert load_language_model(rounded, dtype="auto").model.dtype == torch.bfloat16
    assert not load_language_model(rounded).model.training
