"""Data files: texts as JSONL or plain text, tokenised here, and arrays as NPZ.

Every text becomes examples of its own length, within a limit, and examples of equal length share batches: by length,
then in the order of the file. The number of an example is its position in the file, whatever its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.batches import Batch, as_batches
from mergekit_lfm.runtime.lines import DataLine, read_lines, refuse
from mergekit_lfm.runtime.load import start_token, tokenizer_for_texts
from mergekit_lfm.runtime.tasks import TASKS
from mergekit_lfm.store.files import open_file

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

# The logits of a window are [window, vocabulary], and their gradients as much again: 512 tokens keep a batch of 16 with
# 32k entries at 1 GB.
DATA_WINDOW = 512


def read_data(
    path: str | Path,
    task: str,
    tokenizer: Tokenizer | None = None,
    *,
    window: int | None = None,
    positions: int | None = None,
    batch_size: int = 16,
    max_examples: int | None = None,
) -> list[Batch]:
    """The examples in a file, in batches of at most batch_size.

    .jsonl: an object {"text": ...} on each line, with "label" a class from 0 if the data have labels. .txt: for "lm"
    one document, else one text on each line. .npz: arrays with the names of the model's inputs, or a single "x", passed
    by position; first axis = examples; optionally "labels".

    For "lm" an example is a piece of a document, of at most `window` tokens including the start token before it; for
    the other tasks a text with its special tokens, cut off at `window`. window defaults to the limit of the model and
    its tokenizer, for "lm" to at most 512. positions: the longest sequence of the model, None without a limit.
    max_examples: read only the first ones of the file. Raises FormatError for any other file, PlanError for options
    that do not fit it.
    """
    if task not in TASKS:
        raise PlanError(f"found the task {task!r}; expected {', '.join(TASKS)}. Choose one of them")
    _at_least(1, batch_size=batch_size, max_examples=max_examples)
    file = Path(path)
    if file.suffix == ".npz":
        if window is not None:
            raise PlanError(f"{file}: a window cuts texts, and these are arrays. Leave it out")
        return _array_batches(file, batch_size, max_examples)
    lines = read_lines(file, whole=task == "lm")
    tokenizer = tokenizer_for_texts(tokenizer)
    if task == "lm":
        _check_window(window, positions, 2)  # the start token, and one to predict
        size = window or min(positions or DATA_WINDOW, DATA_WINDOW)
        return group_rows(_windows(file, lines, tokenizer, size)[:max_examples], None, batch_size)
    limit = text_limit(window, positions, tokenizer)
    texts = lines[:max_examples]
    labels = None if texts[0].label is None else [line.label or 0 for line in texts]
    return group_rows(_sequences(file, texts, tokenizer, limit), labels, batch_size)


def read_pairs(
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    window: int | None = None,
    positions: int | None = None,
    batch_size: int = 16,
) -> tuple[list[Batch], list[Batch], list[int]]:
    """The texts of a JSONL file of {"text": ..., "positive": ...}, the distinct positives, and each text's positive.

    The list holds at i the number of text i's positive among the second batches' examples. Else like `read_data`.
    """
    file = Path(path)
    _at_least(1, batch_size=batch_size)
    lines = read_lines(file, whole=False)
    missing = [f'line {line.number}: no "positive"' for line in lines if line.positive is None]
    if missing:
        refuse(file, missing, 'an object {"text": ..., "positive": ...} on each line')
    tokenizer = tokenizer_for_texts(tokenizer)
    limit = text_limit(window, positions, tokenizer)
    distinct: dict[str, DataLine] = {}  # each positive with the first line that has it
    for line in lines:
        distinct.setdefault(line.positive or "", line._replace(text=line.positive or ""))
    number_of = {positive: i for i, positive in enumerate(distinct)}
    texts, positives = (
        group_rows(_sequences(file, side, tokenizer, limit), None, batch_size) for side in (lines, [*distinct.values()])
    )
    return texts, positives, [number_of[line.positive or ""] for line in lines]


def read_documents(path: str | Path) -> list[str]:
    """The documents in a JSONL file of {"text": ...}, or a whole text file as one document."""
    return [line.text for line in read_lines(Path(path), whole=True)]


def _at_least(least: int, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < least:
            raise PlanError(f"{name} is {number}; expected at least {least}. Give more, or leave it out")


def _check_window(window: int | None, positions: int | None, least: int) -> None:
    if window is not None and (window < least or (positions is not None and window > positions)):
        limit = f"at least {least}" if positions is None else f"{least} to {positions}, the positions of the model"
        raise PlanError(f"window is {window}; expected {limit}. Choose a window in that range, or leave it out")


def text_limit(window: int | None, positions: int | None, tokenizer: Tokenizer) -> int | None:
    """The most tokens of a text: the least of window, positions and the tokenizer's limit; None without any.

    RoBERTa's 514 positions have room for the 512 tokens that its tokenizer allows.
    """
    special = tokenizer.num_special_tokens_to_add()
    _check_window(window, positions, special + 1)
    allowed = tokenizer.model_max_length if tokenizer.model_max_length < 1 << 30 else None  # 1e30 means no limit
    return min((limit for limit in (window, positions, allowed) if limit is not None), default=None)


def frame_of(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before a text, its own tokens, and the special tokens after it.

    Raises FormatError for a tokenizer that puts some inside of it.
    """
    whole: list[int] = tokenizer(text, verbose=False)["input_ids"]
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    first = next((i for i in starts if whole[i : i + len(plain)] == plain), None)
    if first is None:
        raise FormatError("the tokenizer puts special tokens inside of a text; expected them before and after it")
    return whole[:first], plain, whole[first + len(plain) :]


def _windows(path: Path, documents: Sequence[DataLine], tokenizer: Tokenizer, window: int) -> list[list[int]]:
    """The documents' tokens in pieces of at most window - 1, each after the start token: every token is predicted."""
    start = start_token(tokenizer)
    pieces = []
    for tokens in _tokens(path, documents, tokenizer, add_special_tokens=False):
        pieces += [[start, *tokens[i : i + window - 1]] for i in range(0, len(tokens), window - 1)]
    return pieces


def _sequences(path: Path, texts: Sequence[DataLine], tokenizer: Tokenizer, limit: int | None) -> list[list[int]]:
    """The tokens of each text, special ones included, cut off at the limit."""
    return _tokens(path, texts, tokenizer, truncation=limit is not None, max_length=limit, padding=False)


def _tokens(path: Path, texts: Sequence[DataLine], tokenizer: Tokenizer, **options: Any) -> list[list[int]]:
    """The tokens of each text. Raises FormatError for texts without tokens: a tokenizer may drop all they hold."""
    sequences: list[list[int]] = tokenizer([line.text for line in texts], verbose=False, **options)["input_ids"]
    empty = [f"line {line.number}: no token" for line, tokens in zip(texts, sequences, strict=True) if not tokens]
    if empty:
        refuse(path, empty, "texts of at least one token each")
    return sequences


def group_rows(sequences: Sequence[list[int]], labels: Sequence[int] | None, batch_size: int) -> list[Batch]:
    """Batches of equally long sequences, by length and then in their given order."""
    by_length: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(i)
    batches = []
    for length in sorted(by_length):
        rows = by_length[length]
        for numbers in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)):
            batches.append(
                Batch(
                    tuple(numbers),
                    kwargs={"input_ids": torch.tensor([sequences[i] for i in numbers])},
                    labels=None if labels is None else torch.tensor([labels[i] for i in numbers]),
                )
            )
    return batches


def _array_batches(path: Path, batch_size: int, max_examples: int | None) -> list[Batch]:
    tensors = {name: x[:max_examples] for name, x in _arrays(path).items()}
    labels = tensors.pop("labels", None)
    if not tensors or ("x" in tensors and len(tensors) > 1):
        raise FormatError(
            f"{path}: found the inputs {', '.join(tensors) or '(none)'}; expected arrays with the names of the model's "
            'inputs, or "x" alone. Rename them'
        )
    args = (tensors.pop("x"),) if "x" in tensors else ()
    count = len((*args, *tensors.values())[0])
    try:
        (whole,) = as_batches([Batch(tuple(range(count)), args, tensors, labels)])
    except PlanError as error:
        raise FormatError(f"{path}: {error}") from None
    return [_rows(whole, slice(i, i + batch_size)) for i in range(0, count, batch_size)]


def _rows(whole: Batch, rows: slice) -> Batch:
    return Batch(
        whole.indices[rows],
        tuple(x[rows] for x in whole.args),
        {name: x[rows] for name, x in whole.kwargs.items()},
        None if whole.labels is None else whole.labels[rows],
    )


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an NPZ file as tensors, each of at least one axis."""
    try:
        with open_file(path) as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, Mapping):
                raise ValueError("it is a single array")
            return {name: torch.from_numpy(np.atleast_1d(arrays[name])) for name in arrays}
    except (ValueError, TypeError, EOFError, BadZipFile, ZlibError) as error:
        raise FormatError(
            f"{path} is not an archive of arrays that a model takes ({error}); expected arrays of numbers, written by "
            "numpy.savez. Write it anew"
        ) from None
