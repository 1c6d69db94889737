"""Where the tokens of a language model's examples stand in their texts, so that those of two tokenizers can be paired.

The place of a token is the number of characters before it in the texts of its example: a text, a prompt and a
completion, or the contents of messages. Special tokens and the words of a chat template have no part in it. So two
tokens of one place are predicted after the same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lfm.distill.watch import PLACES, Part
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.templates import Template
from mergekit_lfm.runtime.lines import read_lines, refuse
from mergekit_lfm.train.conversations import Numbered, write_turns
from mergekit_lfm.train.examples import IGNORED, Examples
from mergekit_lfm.train.texts import language_lines

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

NOWHERE = -1  # the place of a token that has none
MARK = "\u27e6content\u27e7"  # stands for a content, to see what a chat template writes around it

CURE = "expected each as it is, for uld. Set another chat_template, or give prompts with completions"


def with_places(examples: Examples, path: Path, tokenizer: Tokenizer, templates: Sequence[Template] = ()) -> Examples:
    """The examples of a file in the order of its lines, each with the `places` of its tokens, -1 for those without.

    A token begins where the one before it ends; the end token stands at the end of the text. A token that begins
    within a character, as bytes do, has no place. Raises FormatError for texts that are longer than a window, which two
    tokenizers would cut in different places; PlanError for examples with images or of preferences, a tokenizer without
    offsets, and a chat template that changes the contents of messages.
    """
    _check(examples, path, tokenizer)
    lines = language_lines(path, templates) or [
        Numbered({"text": line.text}, line.number) for line in read_lines(path, whole=True)
    ]
    places, items = [_places(line.entry, tokenizer) for line in lines], examples.items
    if "text" in lines[0].entry:
        longest = max(len(item["input_ids"]) for item in items)
        sizes = [len(own) for own in places]
        long = [f"line {x.line}: {size} tokens" for x, size in zip(lines, sizes, strict=True) if size > longest]
        if long:
            refuse(path, long, f"texts of at most {longest} tokens with uld, so that each is one window")
        by_length = sorted(range(len(lines)), key=sizes.__getitem__)  # as `read_data` has them
        item_of = dict(zip(by_length, items, strict=True))
        items = [item_of[number] for number in range(len(lines))]
    placed = [{**item, PLACES: torch.tensor(own)} for item, own in zip(items, places, strict=True)]
    return replace(examples, items=placed, pad={**examples.pad, PLACES: NOWHERE})


def _check(examples: Examples, path: Path, tokenizer: Tokenizer) -> None:
    if examples.items[0].keys() != {"input_ids", "labels"}:
        found = ", ".join(examples.items[0])
        raise PlanError(f"{path}: found {found}; expected texts, answers or conversations for uld. Give such")
    if not getattr(tokenizer, "is_fast", False):
        raise PlanError(
            f"{type(tokenizer).__name__} does not map its tokens to characters, expected a fast tokenizer for uld. "
            "Save the model with one (tokenizer.json)"
        )


def without_places(examples: Examples) -> Examples:
    """The examples as a model takes them."""
    items = [{name: x for name, x in item.items() if name != PLACES} for item in examples.items]
    return replace(examples, items=items, pad={name: value for name, value in examples.pad.items() if name != PLACES})


def _places(entry: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The place of each token of an example, in the order of its tokens.

    One more lies between two texts of an example, so that the end of one is not the beginning of the next.
    """
    if "messages" in entry:
        return _places_in_messages(entry["messages"], tokenizer)
    if "text" in entry:
        return [NOWHERE, *_begins(entry["text"], tokenizer)]
    first, answer = len(entry["prompt"]) + 1, entry["completion"]
    begins = [first + begin if begin != NOWHERE else NOWHERE for begin in _begins(answer, tokenizer)]
    end = [] if tokenizer.eos_token_id is None else [first + len(answer)]
    return [NOWHERE, *_begins(entry["prompt"], tokenizer), *begins, *end]


def _begins(text: str, tokenizer: Tokenizer) -> list[int]:
    """Where each token of a text begins: behind the one before it, as offsets may leave out the space between them.

    A token of no width begins where the next one does.
    """
    options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    begins, end = list[int](), 0
    for start, stop in tokenizer(text, **options)["offset_mapping"]:
        begins.append(end if start >= end else NOWHERE)
        end = max(end, stop)
    return begins


def _places_in_messages(turns: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """The places of a conversation's tokens, by the contents of its messages without blanks around them."""
    text, place_of, first = write_turns(tokenizer, turns, False), dict[int, int](), 0
    for start, stop in _contents(turns, tokenizer, text):
        place_of |= {at: first + at - start for at in range(start, stop + 1)}
        first += stop - start + 1
    return [place_of.get(begin, NOWHERE) for begin in _begins(text, tokenizer)]


def _contents(turns: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int]]:
    """Where the content of each message begins and ends in a conversation as a text, without blanks around it."""
    around = write_turns(tokenizer, [{**turn, "content": MARK} for turn in turns], False).split(MARK)
    if len(around) != len(turns) + 1:
        raise PlanError(f"the chat template writes {len(around) - 1} of {len(turns)} contents; {CURE}")
    at = len(around[0])
    for turn, behind in zip(turns, around[1:], strict=True):
        forms = (turn["content"], turn["content"].strip())
        kept = next((form for form in forms if text.startswith(form + behind, at)), None)
        if kept is None:
            raise PlanError(f"the chat template changes {turn['content'][:40]!r}, or the words around it; {CURE}")
        start = at + len(kept) - len(kept.lstrip())
        yield start, start + len(kept.strip())
        at += len(kept) + len(behind)


def target_places(item: Mapping[str, Tensor]) -> list[int]:
    """The places of an example's targets."""
    places: list[int] = item[PLACES][1:][item["labels"][1:] != IGNORED].tolist()
    return places


def pair_places(mine: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
    """The numbers of targets that are in one place; of several in a place the last, which has the text behind it."""
    own, other = ({place: number for number, place in enumerate(each) if place != NOWHERE} for each in (mine, theirs))
    return [(number, other[place]) for place, number in own.items() if place in other]


def pair_parts(mine: Part, theirs: Part) -> tuple[list[int], list[int], list[int]]:
    """The rows of two parts of places that belong together, and how many pairs each example has."""
    own, other, counts, firsts = list[int](), list[int](), list[int](), [0, 0]
    for sizes in zip(mine.counts, theirs.counts, strict=True):
        sides = [
            part.values[first : first + size, 0].tolist()
            for part, first, size in zip((mine, theirs), firsts, sizes, strict=True)
        ]
        pairs = pair_places(*sides)
        own += [firsts[0] + a for a, _ in pairs]
        other += [firsts[1] + b for _, b in pairs]
        counts.append(len(pairs))
        firsts = [first + size for first, size in zip(firsts, sizes, strict=True)]
    return own, other, counts
