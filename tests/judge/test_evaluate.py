"""Judges, against one token or example at a time, transformers' own loss, and cases with a known answer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import POSITIONS, bert_config, byte_tokenizer, llama_config, save_model, write_lines
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.judge.evaluate import Accuracy, Retrieval, accuracy, perplexity, pieces, retrieval
from mergekit_lfm.runtime.load import Loaded, load_model

TEXT = "Every token is predicted once, Überlänge included: ein Wort, 言葉.\n" * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over bytes."""
    return save_model(tmp_path_factory.mktemp("bytes"), "LlamaForCausalLM", llama_config(), byte_tokenizer())


@pytest.fixture
def loaded(folder: Path) -> Any:
    return load_model(folder, "lm")


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def one_by_one(loaded: Loaded, text: str, window: int, stride: int) -> float:
    """Bits of the text with a run of the model for every token, in float64."""
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
def test_agrees_with_the_model_run_once_for_every_token(loaded: Loaded, window: int | None, stride: int | None) -> None:
    found = perplexity(loaded, TEXT, window=window, stride=stride)
    bits = one_by_one(loaded, TEXT, window or POSITIONS, stride or POSITIONS)
    assert found.tokens == found.bytes == len(TEXT.encode())
    assert found.nll == pytest.approx(bits * math.log(2), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(bits / found.bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(2 ** (bits / found.tokens), rel=1e-4)


def test_agrees_with_the_loss_of_transformers(loaded: Any) -> None:
    text = TEXT[: POSITIONS - 8]
    ids = torch.tensor([[0, *loaded.tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        loss = loaded.model(ids, labels=ids).loss.item()
    assert math.log(perplexity(loaded, text).perplexity) == pytest.approx(loss, rel=1e-5)


def test_a_model_without_an_opinion_costs_the_logarithm_of_its_vocabulary(loaded: Any) -> None:
    torch.nn.init.zeros_(loaded.model.get_output_embeddings().weight)
    found = perplexity(loaded, "Ü言")
    assert (found.tokens, found.bytes) == (5, 5)
    numbers = (found.nll, found.perplexity, found.bits_per_byte)
    assert numbers == pytest.approx((5 * math.log(258), 258, math.log2(258)))


def test_a_model_that_is_sure_and_wrong_has_infinite_perplexity(loaded: Any) -> None:
    weight = loaded.model.get_output_embeddings().weight
    torch.nn.init.normal_(weight, std=1e4, generator=torch.Generator().manual_seed(0))
    found = perplexity(loaded, TEXT)
    assert found.perplexity == math.inf
    assert 1000 < found.bits_per_byte < math.inf


def test_bits_per_byte_do_not_depend_on_how_the_bytes_are_cut(folder: Path, tmp_path: Path) -> None:
    """A tokenizer with one merge more has fewer tokens; models of the same text still share the unit."""
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


def test_a_folder_gives_the_same_as_the_loaded_model(folder: Path, loaded: Loaded) -> None:
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
def test_messages_name_texts_that_cannot_be_measured(
    loaded: Loaded, text: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        perplexity(loaded, text, **options)


def test_without_bos_the_text_starts_after_eos(folder: Path, loaded: Any, tmp_path: Path) -> None:
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


def test_of_several_documents_every_one_starts_anew(loaded: Any) -> None:
    first, second = "one document", "and another, which is longer than the window of the model"
    together, parts = perplexity(loaded, [first, second]), [perplexity(loaded, text) for text in (first, second)]
    assert (together.tokens, together.bytes) == (sum(p.tokens for p in parts), len(first) + len(second))
    assert together.nll == pytest.approx(sum(p.nll for p in parts))
    assert together.nll != pytest.approx(perplexity(loaded, first + second).nll)


def test_a_text_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    with pytest.raises(PlanError, match="the model has no tokenizer"):
        perplexity(other, TEXT)


# ------------------------------------------------------------------ accuracy


class Scores(nn.Module):
    """Returns its input as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_accuracy_by_hand() -> None:
    """Right; wrong; a tie, which the first class wins; NaN, which is never right."""
    scores = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [3.0, 3.0, 1.0], [math.nan, 1.0, 0.0]])
    labels = torch.tensor([1, 2, 0, 0])
    for cut in (1, 4):
        data = [(scores[i : i + cut], labels[i : i + cut]) for i in range(0, 4, cut)]
        assert accuracy(Scores(), data) == Accuracy(4, 2, 0.5)


def test_accuracy_of_a_folder_is_that_of_each_text_alone(tmp_path: Path) -> None:
    folder = save_model(
        tmp_path / "m", "BertForSequenceClassification", bert_config(num_labels=3), byte_tokenizer(special=True)
    )
    texts = [chr(97 + i) * (i % 4 + 1) for i in range(20)]
    loaded = load_model(folder, "classification")
    assert loaded.tokenizer is not None
    with torch.no_grad():
        each = [loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts]
    assert len(set(each)) > 1
    labels = [(c + (i % 5 == 0)) % 3 for i, c in enumerate(each)]  # a fifth of them wrong
    data = write_lines(tmp_path / "x.jsonl", *({"text": t, "label": c} for t, c in zip(texts, labels, strict=True)))
    assert accuracy(folder, data) == accuracy(loaded, data, batch_size=3) == Accuracy(20, 16, 0.8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(2, 3)], "the data have no labels"),
        ([(torch.zeros(2, 3), torch.tensor([0, 3]))], "labels go from 0 to 3; expected scores"),
        ([(torch.zeros(2, 3), torch.tensor([-100, 0]))], "labels go from -100 to 0"),
        ([(torch.zeros(2, 3, 4), torch.tensor([0, 1]))], r"the model gives scores \[2, 3, 4\]"),
    ],
)
def test_accuracy_of_data_without_an_answer_is_refused(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        accuracy(Scores(), data)


# ------------------------------------------------------------------ retrieval


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_tokenizer(special=True)
    return save_model(tmp_path_factory.mktemp("encoder"), "BertModel", bert_config(), tokenizer)


def test_retrieval_in_batches_equals_one_text_at_a_time(encoder: Path, tmp_path: Path) -> None:
    lines = [("ab", "abc"), ("cd", "xyz"), ("hello", "hello!"), ("ef", "abc"), ("longer text", "longer test")]
    data = write_lines(tmp_path / "x.jsonl", *({"text": t, "positive": p} for t, p in lines))
    loaded = load_model(encoder, "embedding")
    assert loaded.tokenizer is not None

    def vector(text: str) -> Tensor:
        assert loaded.tokenizer is not None
        with torch.no_grad():
            states: Tensor = loaded.model(**loaded.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.double().mean(0)
        unit: Tensor = mean / mean.norm()
        return unit

    candidates = sorted({positive for _, positive in lines})
    places = []
    for text, positive in lines:
        nearest = sorted(candidates, key=lambda c: -float(vector(text) @ vector(c)))
        places.append(nearest.index(positive) + 1)
    assert len(set(places)) > 1
    expected = Retrieval(5, places.count(1) / 5, pytest.approx(sum(1 / p for p in places) / 5))  # type: ignore[arg-type]
    assert retrieval(encoder, data) == retrieval(loaded, data, batch_size=1) == expected


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_an_encoder_that_gives_everything_the_same_vector_finds_nothing(
    encoder: Path, tmp_path: Path, value: float
) -> None:
    data = write_lines(tmp_path / "x.jsonl", *({"text": str(i), "positive": f"p{i}"} for i in range(4)))
    loaded = load_model(encoder, "embedding")
    for parameter in loaded.model.parameters():
        nn.init.constant_(parameter, value)
    assert retrieval(loaded, data) == Retrieval(4, 0.0, 0.25)
