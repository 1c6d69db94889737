"""Batches: nothing is padded or lost, the same data have the same digest, and messages name the line of wrong data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_text import BOS, EOS, VOCABULARY, byte_tokenizer, write_lines
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from torch.utils.data import DataLoader, TensorDataset

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.batches import Batch, as_batches, digest_of
from mergekit_lfm.runtime.data import _windows, read_data, read_documents, read_pairs
from mergekit_lfm.runtime.lines import DataLine

PLAIN, SPECIAL = byte_tokenizer(limit=10**30), byte_tokenizer(special=True)
TEXTS = ["seven b", "three", "one", "équal", "two"]  # of 7, 5, 3, 6 and 3 bytes


def spelled(ids: list[int]) -> str:
    text: str = PLAIN.decode([i for i in ids if i not in (BOS, EOS)])
    return text


def rows(batches: list[Batch]) -> dict[int, tuple[list[int], int | None]]:
    """Tokens and label of every example, by its number."""
    found: dict[int, tuple[list[int], int | None]] = {}
    for batch in batches:
        labels = [None] * len(batch) if batch.labels is None else batch.labels.tolist()
        tokens = batch.kwargs["input_ids"].tolist()
        found |= {i: (ids, label) for i, ids, label in zip(batch.indices, tokens, labels, strict=True)}
    assert len(found) == sum(map(len, batches))
    return found


# ------------------------------------------------------------------ texts


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_text_is_an_example_with_its_label_and_nothing_is_padded(tmp_path: Path, batch_size: int) -> None:
    path = write_lines(tmp_path / "x.jsonl", *({"text": t, "label": i % 3} for i, t in enumerate(TEXTS)), "")
    batches = read_data(path, "classification", SPECIAL, batch_size=batch_size)
    found = rows(batches)
    assert [spelled(found[i][0]) for i in range(5)] == TEXTS
    assert [found[i][1] for i in range(5)] == [0, 1, 2, 0, 1]
    assert all((ids[0], ids[-1], len(ids)) == (BOS, EOS, len(TEXTS[i].encode()) + 2) for i, (ids, _) in found.items())
    assert max(map(len, batches)) <= batch_size
    assert all(set(batch.kwargs) == {"input_ids"} for batch in batches)


def test_batches_go_by_length_and_then_by_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", *({"text": text} for text in TEXTS))
    assert [batch.indices for batch in read_data(path, "embedding", SPECIAL)] == [(2, 4), (1,), (3,), (0,)]
    assert [batch.indices for batch in read_data(path, "embedding", SPECIAL, max_examples=3)] == [(2,), (1,), (0,)]


def test_text_files_have_a_text_on_each_line_or_are_one_document(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\n\n  \ntwo\n")
    found = rows(read_data(path, "embedding", SPECIAL))
    assert [spelled(found[i][0]) for i in range(len(found))] == ["one", "two"]
    (batch,) = read_data(path, "lm", PLAIN)
    assert spelled(batch.kwargs["input_ids"][0].tolist()) == path.read_text()
    assert read_documents(path) == [path.read_text()]


def test_a_separator_within_a_json_text_ends_no_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", '{"text": "a\u2028b"}')
    assert read_documents(path) == ["a\u2028b"]


@pytest.mark.parametrize(("window", "positions", "longest"), [(None, None, 32), (None, 20, 20), (9, 20, 9)])
def test_texts_are_cut_off_where_the_model_or_its_tokenizer_ends(
    tmp_path: Path, window: int | None, positions: int | None, longest: int
) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"text": "x" * 100})
    (batch,) = read_data(path, "embedding", SPECIAL, window=window, positions=positions)
    assert batch.kwargs["input_ids"].shape == (1, longest)
    assert batch.kwargs["input_ids"][0, -1] == EOS


@pytest.mark.parametrize(("window", "positions", "longest"), [(None, None, 512), (None, 600, 512), (None, 20, 20)])
def test_documents_are_cut_into_windows_of_the_models_positions(
    tmp_path: Path, window: int | None, positions: int | None, longest: int
) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"text": "x" * 2000})
    lengths = {
        ids: len(row[0]) for ids, row in rows(read_data(path, "lm", PLAIN, window=window, positions=positions)).items()
    }
    assert max(lengths.values()) == longest
    assert len(lengths) == math.ceil(2000 / (longest - 1))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(2, 40))
def test_every_token_of_every_document_is_predicted_once(sizes: list[int], window: int) -> None:
    documents = [chr(97 + i) * size for i, size in enumerate(sizes)]
    found = _windows(Path("x.txt"), [DataLine(document) for document in documents], PLAIN, window)
    assert all(ids[0] == BOS and 2 <= len(ids) <= window for ids in found)
    assert "".join(spelled(ids) for ids in found) == "".join(documents)
    assert all(len(set(ids[1:])) == 1 for ids in found)  # no window mixes documents


# ------------------------------------------------------------------ pairs


def test_pairs_share_positives_that_are_the_same(tmp_path: Path) -> None:
    lines = [("a", "xyz"), ("bb", "uv"), ("c", "xyz")]
    path = write_lines(tmp_path / "x.jsonl", *({"text": t, "positive": p} for t, p in lines))
    texts, positives, own = read_pairs(path, SPECIAL)
    assert [spelled(ids) for _, (ids, _) in sorted(rows(texts).items())] == ["a", "bb", "c"]
    assert [spelled(ids) for _, (ids, _) in sorted(rows(positives).items())] == ["xyz", "uv"]
    assert own == [0, 1, 0]


def test_the_message_has_the_lines_of_pairs_without_a_positive(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"text": "a", "positive": "b"}, {"text": "c"})
    with pytest.raises(FormatError, match=r'x\.jsonl: expected .*"positive".*\n  line 2: no "positive"'):
        read_pairs(path, SPECIAL)


# ------------------------------------------------------------------ errors in a file


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"', {"text": "b"}], r"line 1: not JSON"),
        ([{"text": "a"}, {"txet": "b"}], r'line 2: no "text"'),
        ([{"text": "a"}, {"text": " "}], r'line 2: no "text", or an empty one'),
        ([{"text": "a"}, "[1]"], r'line 2: no "text"'),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "1"}], r'line 2: "label" is "1", not a whole number'),
        ([{"text": "a", "label": True}], r'line 1: "label" is true'),
        ([{"text": "a", "label": -1}], r'line 1: "label" is -1'),
        ([{"text": "a", "label": 1}, {"text": "b"}], r'1 of 2 lines have no "label"'),
        ([{"text": "a", "positive": 3}], r'line 1: "positive" is not a text'),
        (["", ""], r"x\.jsonl is empty"),
    ],
)
def test_the_message_names_a_wrong_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_data(write_lines(tmp_path / "x.jsonl", *lines), "classification", SPECIAL)


def test_one_message_lists_all_wrong_lines_but_not_thousands(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as raised:
        read_data(write_lines(tmp_path / "x.jsonl", *["?"] * 5000), "classification", SPECIAL)
    assert all(f"line {i}: " in str(raised.value) for i in range(1, 11))
    assert "and 4990 more" in str(raised.value) and len(str(raised.value)) < 2000


def test_files_that_are_not_data_are_refused(tmp_path: Path) -> None:
    for name in ("x.csv", "x"):
        (tmp_path / name).write_text("a")
        with pytest.raises(FormatError, match=r"expected \.jsonl or \.txt"):
            read_data(tmp_path / name, "lm", PLAIN)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="expected UTF-8"):
        read_data(tmp_path / "x.txt", "lm", PLAIN)
    with pytest.raises(FileNotFoundError):
        read_data(tmp_path / "nowhere.jsonl", "lm", PLAIN)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("lm", {"window": 21, "positions": 20}, "window is 21; expected 2 to 20, the positions"),
        ("lm", {"window": 1}, "window is 1; expected at least 2"),
        ("embedding", {"window": 2}, "window is 2; expected at least 3"),
        ("embedding", {"window": 33, "positions": 32}, "window is 33; expected 3 to 32"),
        ("embedding", {"batch_size": 0}, "batch_size is 0"),
        ("embedding", {"max_examples": 0}, "max_examples is 0"),
        ("embeding", {}, "the task 'embeding'; expected lm, classification, embedding"),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, task: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_data(write_lines(tmp_path / "x.jsonl", {"text": "a"}), task, SPECIAL, **options)


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the model has no tokenizer"):
        read_data(write_lines(tmp_path / "x.jsonl", {"text": "a"}), "embedding")


# ------------------------------------------------------------------ arrays


def test_arrays_are_the_models_inputs_by_position_or_by_name(tmp_path: Path) -> None:
    x, labels = np.arange(15.0, dtype=np.float32).reshape(5, 3), np.array([3, 0, 1, 2, 1], dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x, labels=labels)
    batches = read_data(tmp_path / "x.npz", "classification", batch_size=2, max_examples=4)
    assert [batch.indices for batch in batches] == [(0, 1), (2, 3)]
    assert torch.equal(torch.cat([batch.args[0] for batch in batches]), torch.from_numpy(x[:4]))
    assert [batch.labels.tolist() for batch in batches if batch.labels is not None] == [[3, 0], [1, 2]]
    assert all(batch.labels is not None and batch.labels.dtype == torch.int64 for batch in batches)
    np.savez(tmp_path / "y.npz", pixel_values=x)
    (batch,) = read_data(tmp_path / "y.npz", "classification")
    assert (batch.args, list(batch.kwargs), batch.labels) == ((), ["pixel_values"], None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2)), "labels": np.zeros(2, int)}, r"labels has shape \[2\], other inputs have 3 examples"),
        ({"a": np.zeros((3, 2)), "b": np.zeros(())}, r"b has shape \[1\]"),
        ({"x": np.zeros((3, 2)), "y": np.zeros((3, 2))}, 'found the inputs x, y; expected .* "x" alone'),
        ({"labels": np.zeros(3, int)}, r"found the inputs \(none\)"),
        ({"x": np.zeros((3, 2)), "labels": np.zeros(3)}, "labels are torch.float64"),
        ({"x": np.zeros((0, 2))}, "holds no example"),
        ({"x": np.array(["a", "b"])}, "not an archive of arrays that a model takes"),
        ({"x": np.array([{}, {}])}, "not an archive of arrays that a model takes"),
        ({"input_ids": np.ones((2, 2), int), "attention_mask": np.eye(2, dtype=int)}, "attention_mask has zeros"),
    ],
)
def test_arrays_that_are_wrong(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(FormatError, match=message):
        read_data(tmp_path / "x.npz", "classification")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off"])
def test_files_that_are_not_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.npz is not an archive"):
        read_data(tmp_path / "x.npz", "classification")


def test_a_single_array_or_a_window_over_arrays_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(FormatError, match="a single array"):
        read_data(tmp_path / "x.npz", "classification")
    with pytest.raises(PlanError, match="a window cuts texts"):
        read_data(tmp_path / "x.npz", "classification", window=8)


# ------------------------------------------------------------------ data of a Python user

X, Y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


class Indexed:
    """Batches by number, without an end that Python could find."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return X[2 * (i % 3) : 2 * (i % 3) + 2], Y[2 * (i % 3) : 2 * (i % 3) + 2]


PAIRS = [(X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)]


@pytest.mark.parametrize(
    "data",
    [
        PAIRS,
        [list(pair) for pair in PAIRS],
        [((x,), y) for x, y in PAIRS],
        [Batch((i, i + 1), (X[i : i + 2],), {}, Y[i : i + 2].int()) for i in (0, 2, 4)],
        DataLoader(TensorDataset(X, Y), batch_size=2),
        Indexed(),
    ],
    ids=["pairs", "lists", "tuples", "batches", "loader", "indexed"],
)
def test_the_same_examples_are_the_same_batches(data: Any) -> None:
    batches = as_batches(data)
    assert [batch.indices for batch in batches] == [(0, 1), (2, 3), (4, 5)]
    for _ in range(2):
        assert torch.equal(torch.cat([batch.args[0] for batch in batches]), X)
        assert torch.equal(torch.cat([batch.labels for batch in batches if batch.labels is not None]), Y)
    assert batches[-1].indices == (4, 5) and len(batches[1:]) == 2
    assert digest_of(batches) == digest_of(list(batches)) == digest_of(as_batches(PAIRS))


def test_dictionaries_are_keyword_inputs() -> None:
    entry = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    for item in (entry | {"labels": Y[:2]}, (entry, Y[:2])):
        (batch,) = as_batches([item])
        assert (batch.args, set(batch.kwargs), batch.indices) == ((), set(entry), (0, 1))
        assert batch.labels is not None and batch.labels.tolist() == [0, 1]
    (batch,) = as_batches([X])
    assert (len(batch), batch.labels) == (6, None)


def other_digests() -> Iterator[list[Batch]]:
    yield [Batch((0, 1), (X[:2],), {}, Y[2:4])]
    yield [Batch((0, 1), (X[2:4],), {}, Y[:2])]
    yield [Batch((1, 0), (X[:2],), {}, Y[:2])]
    yield [Batch((0, 1), (), {"x": X[:2]}, Y[:2])]
    yield [Batch((0, 1), (), {"y": X[:2]}, Y[:2])]
    yield [Batch((0, 1), (X[:2].double(),), {}, Y[:2])]
    yield [Batch((0, 1), (X[:2].reshape(2, 1, 2),), {}, Y[:2])]
    yield [Batch((0, 1), (X[:2],))]
    yield [Batch((0,), (X[:1],), {}, Y[:1]), Batch((1,), (X[1:2],), {}, Y[1:2])]
    yield [Batch((0, 1), (X[:2],), {}, Y[:2])]


def test_a_digest_depends_on_all_that_the_model_sees() -> None:
    found = [digest_of(batches) for batches in other_digests()]
    assert len(set(found)) == len(found)
    assert found == [digest_of(batches) for batches in other_digests()]
    strided = Batch((0, 1), (X[:2].T.contiguous().T,), {}, Y[:2])
    assert digest_of([strided]) == found[-1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, r"data is one Tensor; .* \[batch\]"),
        ((X, Y), r"data is one tuple"),
        ({"x": X}, r"data is one dict"),
        (3, r"data is one int"),
        (iter(PAIRS), "can be read only once"),
        ([], "hold no batch"),
        ([X[:0]], "holds no example"),
        (TensorDataset(X, Y), r"batch 0: labels has shape \[\].*A Dataset of single examples goes into a DataLoader"),
        ([(X, Y[:3])], r"labels has shape \[3\], other inputs have 6 examples"),
        ([(X, Y.float())], r"labels are torch.float32"),
        ([PAIRS[0], "text"], r"batch 1: input 0 is a str, not a Tensor"),
        ([{"x": X, "attention_mask": Y}], "attention_mask has zeros"),
        ([Batch((0, 1), (X,))], "other inputs have 2 examples"),
        ([Batch((0, 1), (X[:2],)), Batch((1, 2), (X[2:4],))], "batches share the numbers of examples"),
    ],
)
def test_objects_that_are_not_data_are_refused(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        as_batches(data)


def test_a_loader_that_shuffles_is_found_out() -> None:
    order = torch.Generator().manual_seed(0)
    batches = as_batches(DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, generator=order))
    with pytest.raises(PlanError, match="Switch off shuffling"):
        list(batches)


class Growing:
    """One batch more, or less, every time."""

    def __init__(self, by: int) -> None:
        self.count, self.by = 2, by

    def __iter__(self) -> Iterator[Any]:
        self.count += self.by
        return iter(PAIRS[: self.count])


@pytest.mark.parametrize("by", [1, -1])
def test_data_that_become_more_or_less_are_found_out(by: int) -> None:
    source = Growing(0)
    batches = as_batches(source)
    source.by = by
    with pytest.raises(PlanError, match="differs from the first time that it was read"):
        list(batches)


def test_a_batch_goes_to_a_model_in_its_dtype() -> None:
    model = torch.nn.Linear(2, 2, dtype=torch.float64)
    batch = Batch((0,), (X[:1],), {"input_ids": Y[None, :2]}, Y[:1]).to(model)
    assert (batch.args[0].dtype, batch.kwargs["input_ids"].dtype, batch.indices) == (torch.float64, torch.int64, (0,))
    without = Batch((0,), (X[:1],))
    assert without.to(torch.nn.ReLU()) is without


def test_tokens_are_of_the_vocabulary(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"text": "".join(map(chr, range(32, 1000)))})
    assert max(max(ids) for ids, _ in rows(read_data(path, "lm", PLAIN)).values()) < VOCABULARY


def test_the_message_has_the_line_of_a_text_without_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    path = write_lines(tmp_path / "x.jsonl", {"text": "a", "positive": "?"}, "", {"text": "?", "positive": "a"})
    for task in ("lm", "embedding"):
        with pytest.raises(FormatError, match=r"x\.jsonl: expected texts of at least one token .*\n  line 3: no token"):
            read_data(path, task, tokenizer)
    with pytest.raises(FormatError, match="line 3: no token"):
        read_pairs(path, tokenizer)
    assert len(read_data(path, "embedding", tokenizer, max_examples=1)) == 1
    plain = tmp_path / "x.txt"
    plain.write_text("a\n\n??\n")
    with pytest.raises(FormatError, match="line 3: no token"):
        read_data(plain, "classification", tokenizer)
