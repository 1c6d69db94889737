"""Prompts with answers, and conversations, as tokens with labels for those that are learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.runtime.lines import refuse
from mergekit_lfm.runtime.load import start_token
from mergekit_lfm.train.examples import IGNORED, Examples, padding_of

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

Item = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Numbered:
    """An object of a JSONL file, and the number of its line."""

    entry: Mapping[str, Any]
    line: int


def why_no_messages(messages: object) -> str | None:
    """The reason why a value is not a list of messages, in words; None for one."""
    fits = isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    )
    return None if fits else '"messages" is not a list of {"role": ..., "content": ...}'


def why_no_conversation(messages: object) -> str | None:
    """The reason why a value is not a conversation with a message of the assistant, in words; None for one."""
    if why := why_no_messages(messages):
        return why
    assert isinstance(messages, list)
    return None if any(each["role"] == "assistant" for each in messages) else "no message of the assistant"


def read_conversations(path: Path, lines: Sequence[Numbered], tokenizer: Tokenizer, limit: int | None) -> list[Item]:
    """Prompts with completions, or messages: tokens, and as labels those to be learned."""
    items, problems = list[Item](), list[str]()
    for line in lines:
        turns = line.entry.get("messages")
        if "text" in line.entry or "chosen" in line.entry:
            problems.append(f"line {line.line}: {next(iter(line.entry))}; the first line has another form")
            continue
        encode = partial(encode_messages, tokenizer)
        ids, labels = label_turns(turns, encode) if turns else _encode_answer(line.entry, tokenizer)
        if limit is not None and len(ids) > limit:
            problems.append(f"line {line.line}: {len(ids)} tokens")
            continue
        items.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    if problems:
        refuse(path, problems, "conversations of one form" + (f", of at most {limit} tokens" if limit else ""))
    return items


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens before an answer: the start token, and those of the prompt."""
    return [start_token(tokenizer), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _encode_answer(entry: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The start token, the prompt, the completion and the end token, if there is one; labels for the last two."""
    prompt = encode_prompt(entry["prompt"], tokenizer)
    answer = encode_completion(entry, tokenizer)
    return prompt + answer, [IGNORED] * len(prompt) + answer


def encode_completion(entry: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a completion, and the end token, if there is one."""
    answer: list[int] = [*tokenizer(entry["completion"], add_special_tokens=False)["input_ids"]]
    return answer + ([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])


def read_preferences(path: Path, lines: Sequence[Numbered], tokenizer: Tokenizer, limit: int | None) -> Examples:
    """Prompts with a chosen answer and a rejected one, as `rejected_input_ids` and `rejected_labels`."""
    items, problems = list[Item](), list[str]()
    for line in lines:
        if "chosen" not in line.entry:
            problems.append(f"line {line.line}: no chosen and rejected answer; the first line has them")
            continue
        item = dict[str, Tensor]()
        for start, key in (("", "chosen"), ("rejected_", "rejected")):
            ids, labels = _encode_answer({**line.entry, "completion": line.entry[key]}, tokenizer)
            item |= {f"{start}input_ids": torch.tensor(ids), f"{start}labels": torch.tensor(labels)}
            problems += [f"line {line.line}: {len(ids)} tokens"] if limit is not None and len(ids) > limit else []
        items.append(item)
    if problems:
        refuse(path, problems, "preferences" + (f", of at most {limit} tokens" if limit else ""))
    padding = padding_of(tokenizer)
    return Examples(
        items,
        {
            f"{start}{name}": pad
            for start in ("", "rejected_")
            for name, pad in (("input_ids", padding), ("labels", IGNORED))
        },
    )


def label_turns(
    turns: Sequence[Mapping[str, Any]], encode: Callable[[Sequence[Mapping[str, Any]], bool], list[int]]
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and as labels those that each message of the assistant adds to what is before it.

    encode: the tokens of messages, and, if it is to, of the words that ask for an answer.
    """
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(turns, 1):
        speaks = turn["role"] == "assistant"
        if speaks:  # the words that ask for an answer are not learned
            ids, labels = _extend(ids, labels, encode(turns[: number - 1], True), False)
        if speaks or number == len(turns):  # a template may refuse a conversation that ends elsewhere
            ids, labels = _extend(ids, labels, encode(turns[:number], False), speaks)
    return ids, labels


def _extend(ids: list[int], labels: list[int], longer: list[int], learned: bool) -> tuple[list[int], list[int]]:
    """The tokens of a longer conversation, with labels for those that are new where they are to be learned."""
    same = next((i for i, (a, b) in enumerate(zip(ids, longer, strict=False)) if a != b), min(len(ids), len(longer)))
    new = longer[same:]
    return longer, labels[:same] + (new if learned else [IGNORED] * len(new))


def template_error() -> type[Exception]:
    """The error of a chat template that refuses messages; of jinja2, which comes with torch."""
    from jinja2 import TemplateError

    return TemplateError


def write_turns(writer: Any, turns: Sequence[Mapping[str, Any]], asks: bool) -> str:
    """Messages as a text, by the chat template of a tokenizer or a processor. Raises PlanError if that refuses them.

    asks: also the words that ask for an answer.
    """
    try:
        text: str = writer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=asks
        )
    except (ValueError, TypeError, LookupError, RuntimeError, template_error()) as error:
        raise PlanError(
            f"the chat template cannot write these messages ({reason(error)}); expected a template for "
            "their roles. Set chat_template, or give prompts with completions"
        ) from None
    return text


def encode_messages(tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]], asks: bool) -> list[int]:
    """The tokens of messages, as `write_turns` writes them."""
    text = write_turns(tokenizer, turns, asks)
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found
