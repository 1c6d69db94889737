"""Images with texts, as examples of a language model that takes both.

The model's processor writes what stands for an image into the text, and makes the image the model's inputs. Each line
goes through it once when it is read, so that its tokens are known and counted; the images themselves are made anew for
each batch, and are never in memory together. Nothing is cut: labels are those of the same text without images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lfm.errors import FormatError, PlanError, reason
from mergekit_lfm.runtime.images import images_of
from mergekit_lfm.runtime.lines import refuse
from mergekit_lfm.runtime.load import start_token
from mergekit_lfm.runtime.processors import image_text_processor
from mergekit_lfm.train.conversations import Numbered, encode_completion, label_turns, write_turns
from mergekit_lfm.train.examples import IGNORED, Examples, padding_of
from mergekit_lfm.train.pictures import open_image, read_paths, write_paths

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Loaded

MADE_HERE = ("input_ids", "attention_mask")  # outputs of the processor that `Examples` makes of tokens itself


@dataclass(frozen=True)
class Illustrating:
    """Adds its images to an example, as the processor makes them: the inputs of these `names`."""

    processor: Any
    names: tuple[str, ...]

    def __call__(self, item: Mapping[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
        """The example with its images in place of their files."""
        files = read_paths(item["image"])
        made = _process(self.processor, self.processor.image_token * len(files), files)
        return {**{name: x for name, x in item.items() if name != "image"}, **{name: made[name] for name in self.names}}

    def __repr__(self) -> str:
        return f"{self.names} {self.processor.to_json_string()}"


class _Encoded(NamedTuple):
    """The tokens of a line, those to be learned, the processor's other outputs for each token, and for the images."""

    ids: list[int]
    labels: list[int]
    tokens: dict[str, Tensor]  # each [tokens]
    images: dict[str, Tensor]


def illustrated_examples(path: Path, lines: Sequence[Numbered], loaded: Loaded, limit: int | None) -> Examples:
    """Lines with images as examples: prompts with completions, or messages. limit: the most tokens of one.

    Raises FormatError for lines that do not fit, with the first ten of them; for a model without a processor; and for
    images whose inputs are of several sizes. PlanError for a model of texts alone, and for one behind a prompt.
    """
    processor = image_text_processor(loaded)
    if loaded.virtual:
        raise PlanError("a prompt stands before texts alone, and the data have images; choose another method")
    items, problems, rows = list[Mapping[str, Tensor]](), list[str](), dict[str, tuple[int, ...]]()
    for line in lines:
        files = images_of(line.entry, path.parent)
        encoded = files if isinstance(files, str) else _encode(line.entry, files, processor)
        wrong = encoded if isinstance(encoded, str) else _misfit(encoded, rows, limit)
        if wrong is not None:
            problems.append(f"line {line.line}: {wrong}")
        elif isinstance(files, list) and isinstance(encoded, _Encoded):
            rows = rows or _rows(encoded)
            ids = {"input_ids": torch.tensor(encoded.ids), "labels": torch.tensor(encoded.labels)}
            items.append({"image": write_paths(files), **ids, **encoded.tokens})
    if problems:
        most = f", of at most {limit} tokens" if limit else ""
        refuse(path, problems, f"images that can be read, each with a text{most}, whose inputs are of one size")
    pad = {name: 0 for name in items[0] if name != "image"} | {
        "input_ids": padding_of(processor.tokenizer),
        "labels": IGNORED,
    }
    return Examples(items, pad, change=Illustrating(processor, tuple(rows)), rows=rows)


def _rows(encoded: _Encoded) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape[1:]) for name, x in encoded.images.items()}


def _misfit(encoded: _Encoded, rows: Mapping[str, tuple[int, ...]], limit: int | None) -> str | None:
    """Why a line does not fit the limit, or the first line."""
    if limit is not None and len(encoded.ids) > limit:
        return f"{len(encoded.ids)} tokens"
    own = _rows(encoded)
    return f"{_shown(own)}; the first line has {_shown(rows)}" if rows and own != rows else None


def _shown(rows: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} of {list(shape)}" for name, shape in rows.items())


def _encode(entry: Mapping[str, Any], files: Sequence[Path], processor: Any) -> _Encoded | str:
    """A line as tokens and images, or its problem in words."""
    if "chosen" in entry:
        return "answers to compare, which go without images"
    written = _count(entry, processor.image_token)
    if written not in (0, len(files)):
        return f"{written} times {processor.image_token} for {len(files)} images"
    try:
        if "messages" in entry:
            return _encode_turns(entry["messages"], files, processor, written)
        return _encode_answer(entry, files, processor, written)
    except PlanError:  # of the model: it fits no line
        raise
    except FormatError as error:  # an image that cannot be read
        return str(error)
    except (ValueError, TypeError, IndexError) as error:
        return f"the processor refuses it ({reason(error)})"


def _count(entry: Mapping[str, Any], token: str) -> int:
    """How often a line has the token for an image."""
    texts = [turn["content"] for turn in entry.get("messages", ())] or [entry["prompt"], entry["completion"]]
    return sum(text.count(token) for text in texts)


def _encode_answer(entry: Mapping[str, Any], files: Sequence[Path], processor: Any, written: int) -> _Encoded | str:
    """As of texts: a start token, the prompt, the completion. Images stand before the prompt, if not inside it."""
    if processor.image_token in entry["completion"]:
        return f"{processor.image_token} in the completion"
    start, answer = start_token(processor.tokenizer), encode_completion(entry, processor.tokenizer)
    before = "" if written else f"{processor.image_token}\n" * len(files)
    made = _process(processor, before + entry["prompt"], files, add_special_tokens=False)
    prompt = made["input_ids"][0].tolist()
    tokens, images = _divide(made, len(prompt))
    longer = {name: torch.nn.functional.pad(x, (1, len(answer))) for name, x in tokens.items()}
    return _Encoded([start, *prompt, *answer], [IGNORED] * (1 + len(prompt)) + answer, longer, images)


def _encode_turns(
    turns: Sequence[Mapping[str, Any]], files: Sequence[Path], processor: Any, written: int
) -> _Encoded | str:
    """A conversation by the processor's chat template. Images begin the first message of the user, if none is written.

    The text without images has the labels: it ends as the whole one does, from the first token that is learned on.
    """
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None and not written:
        return "no message of the user, to which the images belong"
    parts: list[dict[str, Any]] = [
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns
    ]
    if not written and first is not None:
        parts[first]["content"][:0] = [{"type": "image"}] * len(files)
    plain, labels = label_turns(parts, partial(_tokens_of_turns, processor))
    learned = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    text = write_turns(processor, parts, False)
    made = _process(processor, text, files, add_special_tokens=_needs_start(processor, text))
    ids = made["input_ids"][0].tolist()
    tail = plain[learned:]
    if ids[len(ids) - len(tail) :] != tail or not tail:
        return "an image after the first words of the assistant, or nothing that is learned"
    tokens, images = _divide(made, len(ids))
    return _Encoded(ids, [IGNORED] * (len(ids) - len(tail)) + labels[learned:], tokens, images)


def _tokens_of_turns(processor: Any, turns: Sequence[Mapping[str, Any]], asks: bool) -> list[int]:
    """The tokens of messages in which one token stands for each image."""
    text = write_turns(processor, turns, asks)
    options: dict[str, Any] = {"add_special_tokens": _needs_start(processor, text), "verbose": False}
    ids: list[int] = processor.tokenizer(text, **options)["input_ids"]
    return ids


def _needs_start(processor: Any, text: str) -> bool:
    """Whether special tokens are added to a text of a chat template: transformers does, if it has no start token."""
    start = processor.tokenizer.bos_token
    return start is None or not text.startswith(start)


def _process(processor: Any, text: str, files: Sequence[str | Path], **options: Any) -> dict[str, Tensor]:
    """The processor's outputs for a text with images, each with a first axis of one text, or of images."""
    images = [[open_image(file) for file in files]]
    made: dict[str, Tensor] = dict(processor(images=images, text=[text], return_tensors="pt", verbose=False, **options))
    return made


def _divide(made: Mapping[str, Tensor], count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs of a processor for each of `count` tokens, and those for images."""
    others = {name: x for name, x in made.items() if name not in MADE_HERE}
    wrong = [name for name, x in others.items() if x.ndim > 2 and x.shape[:2] == (1, count)]
    if wrong:
        raise PlanError(
            f"the model takes {wrong[0]}, which says for each token which images it sees; expected a model whose "
            "images stand among its tokens, such as LLaVA. Give another"
        )
    tokens = {name: x[0] for name, x in others.items() if x.shape == (1, count)}
    return tokens, {name: x for name, x in others.items() if name not in tokens}
