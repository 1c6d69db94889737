"""Training data from files, as examples for a task: texts with a loss on all or on answers, labels, pairs, arrays.

Language models: `{"text": ...}` or a .txt file, in windows, where every token but the first is predicted;
`{"prompt": ..., "completion": ...}`, whose completion alone is; `{"prompt": ..., "chosen": ..., "rejected": ...}`, for
preferences; `{"messages": [{"role": ..., "content": ...}, ...]}`, by the tokenizer's chat template, with a loss on what
the assistant says. Classifiers: `{"text": ..., "label": ...}`. Encoders: `{"text": ..., "positive": ...}`. Arrays: an
.npz with the model's inputs and `labels`. Images: `train.pictures`, with texts `train.illustrated`; other tasks:
`train.forms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.recipe.templates import Template
from mergekit_lfm.runtime.data import read_data, text_limit
from mergekit_lfm.runtime.images import find_images, has_images
from mergekit_lfm.runtime.lines import is_text, read_lines, read_objects, refuse
from mergekit_lfm.runtime.load import tokenizer_for_texts
from mergekit_lfm.runtime.tasks import HEADED
from mergekit_lfm.train.conversations import Item, Numbered, read_conversations, read_preferences, why_no_conversation
from mergekit_lfm.train.examples import IGNORED, Examples, padding_of
from mergekit_lfm.train.forms import FORMS
from mergekit_lfm.train.illustrated import illustrated_examples
from mergekit_lfm.train.pictures import picture_examples

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Loaded, Tokenizer


def read_examples(
    path: Path,
    loaded: Loaded,
    *,
    window: int | None = None,
    templates: Sequence[Template] = (),
    labelled: bool = True,
) -> Examples:
    """The examples in a file for the task of a model. window: the most tokens of one, at most the model's positions.

    labelled: False for classifiers, encoders and numbers without their labels and positives, which may be missing then.
    templates: for language models, ways to make a prompt and a completion of a line; each makes a form of its example.

    Raises FormatError for a file that does not fit, with the first ten lines that do not, and PlanError for a window
    beyond the model. Prompts with completions, and conversations, that are longer than the window are refused: what is
    cut off them would be what is to be learned.
    """
    if loaded.task == "classification":
        config: Any = loaded.model.config
        images = find_images(path, getattr(config, "label2id", None))
        if images is not None:
            return _without_labels(picture_examples(path, images, loaded), labelled)
    if path.suffix == ".npz":
        if loaded.task != "classification":
            raise FormatError(f"{path}: arrays are for classifiers; expected a .jsonl or .txt file for {loaded.task}")
        return _without_labels(_read_arrays(path, window, labelled=labelled), labelled)
    tokenizer = tokenizer_for_texts(loaded.tokenizer)
    if not labelled and loaded.task in (*HEADED, "embedding"):
        return _read_texts(path, tokenizer, text_limit(window, loaded.positions, tokenizer))
    if templates or loaded.task == "lm":
        return _read_language(path, loaded, tokenizer, window, templates)
    if loaded.task in FORMS:
        return FORMS[loaded.task](path, loaded, text_limit(window, loaded.positions, tokenizer))
    if loaded.task == "embedding":
        return _read_pairs(path, tokenizer, text_limit(window, loaded.positions, tokenizer))
    batches = read_data(path, loaded.task, tokenizer, window=window, positions=loaded.positions)
    if batches[0].labels is None:
        raise FormatError(f'{path}: found no labels; expected {{"text": ..., "label": ...}} on each line. Add them')
    items = [
        {"input_ids": row, "labels": label}
        for batch in batches
        if batch.labels is not None
        for row, label in zip(batch.kwargs["input_ids"], batch.labels, strict=True)
    ]
    return Examples(items, {"input_ids": padding_of(tokenizer)})


def _read_language(
    path: Path, loaded: Loaded, tokenizer: Tokenizer, window: int | None, templates: Sequence[Template]
) -> Examples:
    """Texts, answers, conversations or preferences; with images, answers and conversations."""
    limit = text_limit(window, loaded.positions, tokenizer)
    pad = {"input_ids": padding_of(tokenizer), "labels": IGNORED}
    illustrated = has_images(path)
    lines = language_lines(path, templates, illustrated=illustrated)
    if illustrated:
        examples = illustrated_examples(path, lines, loaded, limit)
        return replace(examples, forms=(len(templates),) if templates else ())
    late = [f"line {line.line}: an image; the first line has none" for line in lines if line.entry.get("image")]
    if late:
        refuse(path, late, "images on all lines, or on none")
    if templates:
        return Examples(read_conversations(path, lines, tokenizer, limit), pad, forms=(len(templates),))
    if lines and "chosen" in lines[0].entry:
        return read_preferences(path, lines, tokenizer, limit)
    if lines and "text" not in lines[0].entry:
        return Examples(read_conversations(path, lines, tokenizer, limit), pad)
    pieces = read_data(path, "lm", tokenizer, window=window, positions=loaded.positions)
    rows = [row for batch in pieces for row in batch.kwargs["input_ids"]]
    return Examples([{"input_ids": row, "labels": row} for row in rows], pad)


def language_lines(path: Path, templates: Sequence[Template], *, illustrated: bool = False) -> list[Numbered]:
    """The lines of a .jsonl file for a language model, or what templates make of them; none of a .txt file."""
    if templates:
        return _fill_templates(path, templates)
    if path.suffix != ".jsonl":
        return []
    forms = ("prompt", "messages") if illustrated else ("text", "prompt", "messages")
    expected = f"an object with one of {', '.join(forms)} on each line"
    return read_objects(path, _one_of(forms), expected + (", and an image" if illustrated else ""))


def check_labels(examples: Examples, classes: int | None, place: object) -> None:
    """Raise PlanError for labels that the head of a classifier with so many classes lacks, and for a head of one."""
    if classes == 1:
        raise PlanError(
            "the head of the model has one output; expected one for each class. Choose the task regression, or make a "
            "head by `mergekit-lfm head`"
        )
    labels = {int(item["labels"]) for item in examples.items}
    wrong = sorted(label for label in labels if label < 0 or (classes is not None and label >= classes))
    if classes is not None and wrong:
        raise PlanError(
            f"{place}: found the label {wrong[0]}; expected 0 to {classes - 1}, the classes of the head. Correct "
            "the labels, or give a model with a head for them"
        )


def lengthen_for(loaded: Loaded, sets: Sequence[Examples]) -> list[Examples]:
    """The data sets, their rows lengthened so that the head of a decoder finds each one's last token; sets its config.

    Other models' sets stay as they are.
    """
    if loaded.task not in HEADED or "input_ids" not in sets[0].pad:
        return [*sets]
    config: Any = loaded.model.config
    padding = _token_of_no_ending(sets)
    config.get_text_config().pad_token_id = padding  # by which a decoder finds a row's last token
    return [replace(each, pad={"input_ids": padding}) for each in sets]


def _token_of_no_ending(sets: Sequence[Examples]) -> int:
    """The token to lengthen rows with that no row ends with: theirs, or the first such one."""
    ends = {int(item["input_ids"][-1]) for each in sets for item in each.items}
    mine = sets[0].pad["input_ids"]
    return mine if mine not in ends else next(token for token in range(len(ends) + 1) if token not in ends)


def _one_of(keys: Sequence[str]) -> Callable[[dict[str, Any], int], Numbered | str]:
    def read(entry: dict[str, Any], line: int) -> Numbered | str:
        given = [key for key in keys if key in entry]
        if len(given) != 1:
            return f"{' and '.join(given) or 'none of ' + ', '.join(keys)}"
        if given == ["messages"]:
            wrong = why_no_conversation(entry["messages"])
            return wrong or Numbered(entry, line)
        if given == ["prompt"] and ("chosen" in entry or "rejected" in entry):
            fits = is_text(entry.get("chosen")) and is_text(entry.get("rejected"))
            return Numbered(entry, line) if fits else 'no "chosen" with a "rejected"'
        if given == ["prompt"] and not is_text(entry.get("completion")):
            return 'no "completion", or an empty one'
        return Numbered(entry, line) if isinstance(entry[given[0]], str) else f'"{given[0]}" is not a text'

    return read


def _fill_templates(path: Path, templates: Sequence[Template]) -> list[Numbered]:
    """Each line of a file with each template."""

    def read(entry: dict[str, Any], line: int) -> list[Numbered] | str:
        filled = [template.fill(entry) for template in templates]
        wrong = next((each for each in filled if isinstance(each, str)), None)
        image = {"image": entry["image"]} if "image" in entry else {}
        return wrong or [Numbered({**each, **image}, line) for each in filled if not isinstance(each, str)]

    lines = read_objects(path, read, f"an object with {', '.join(sorted(_keys(templates))) or 'any keys'} on each line")
    return [each for line in lines for each in line]


def _keys(templates: Sequence[Template]) -> set[str]:
    return {key for template in templates for key in template.keys}


def _read_pairs(path: Path, tokenizer: Tokenizer, limit: int | None) -> Examples:
    """Texts with their positives."""

    def read(entry: dict[str, Any], line: int) -> Numbered | str:
        fits = is_text(entry.get("text")) and is_text(entry.get("positive"))
        return Numbered(entry, line) if fits else 'no "text" with a "positive"'

    lines = read_objects(path, read, 'an object {"text": ..., "positive": ...} on each line')
    options: dict[str, Any] = {"truncation": limit is not None, "max_length": limit, "verbose": False}
    sides = [tokenizer([line.entry[key] for line in lines], **options)["input_ids"] for key in ("text", "positive")]
    items = [
        {"input_ids": torch.tensor(text), "positive_input_ids": torch.tensor(positive)}
        for text, positive in zip(*sides, strict=True)
    ]
    padding = padding_of(tokenizer)
    return Examples(items, {"input_ids": padding, "positive_input_ids": padding})


def _read_texts(path: Path, tokenizer: Tokenizer, limit: int | None) -> Examples:
    """Texts alone, whatever else stands on their lines."""

    def read(entry: dict[str, Any], _: int) -> tuple[str] | str:
        return (entry["text"],) if is_text(entry.get("text")) else 'no "text", or an empty one'

    if path.suffix == ".jsonl":
        texts = [text for (text,) in read_objects(path, read, 'an object {"text": ...} on each line')]
    else:
        texts = [line.text for line in read_lines(path, whole=False)]
    options: dict[str, Any] = {"truncation": limit is not None, "max_length": limit, "verbose": False}
    items = [{"input_ids": torch.tensor(row)} for row in tokenizer(texts, **options)["input_ids"]]
    return Examples(items, {"input_ids": padding_of(tokenizer)})


def _without_labels(examples: Examples, labelled: bool) -> Examples:
    """The examples without their labels, unless they are wanted."""
    if labelled:
        return examples
    items = [{name: x for name, x in item.items() if name != "labels"} for item in examples.items]
    return replace(examples, items=items)


def _read_arrays(path: Path, window: int | None, *, labelled: bool) -> Examples:
    """The rows of arrays, by the names of the model's inputs. labelled: whether labels must be there."""
    items: list[Item] = []
    for batch in read_data(path, "classification", None, window=window):
        if batch.args or (batch.labels is None and labelled):
            raise FormatError(
                f"{path}: expected arrays with the names of the model's inputs, such as pixel_values, and labels; "
                f"found {'x' if batch.args else 'no labels'}. Rename or add them"
            )
        named = {**batch.kwargs, **({} if batch.labels is None else {"labels": batch.labels})}
        items += [{name: x[row] for name, x in named.items()} for row in range(len(batch))]
    return Examples(items)
