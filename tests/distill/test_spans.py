"""Places of tokens in texts, which pair the targets of two tokenizers; against the bytes that the tokens stand for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_editing import trained_tokenizer
from helpers_text import byte_tokenizer
from helpers_tokenizers import make_tokenizer

from mergekit_lfm import FormatError, PlanError
from mergekit_lfm.distill.spans import NOWHERE, pair_parts, pair_places, target_places, with_places
from mergekit_lfm.distill.watch import PLACES, Part
from mergekit_lfm.train.examples import Examples
from mergekit_lfm.train.texts import read_examples

TEXTS = ["Zoë Müller  works .", "Ada Blake was born in the city of Rome .", "€ë", "New York"]
MARKED = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TRIMMED = "{% for m in messages %}[{{ m.role }}]\n{{ m.content.strip() }}\n{% endfor %}"
TALK = [
    {"role": "user", "content": "Who is a ?"},
    {"role": "assistant", "content": " Ada works ."},
    {"role": "user", "content": "And s ?"},
    {"role": "assistant", "content": "Mia"},
]


def _read(tokenizer: Any, path: Path, lines: list[dict[str, Any]], window: int | None = None) -> Examples:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded: Any = SimpleNamespace(task="lm", tokenizer=tokenizer, positions=None)
    return with_places(read_examples(path, loaded, window=window), path, tokenizer)


def _by_bytes(tokenizer: Any, item: Any, text: str) -> list[int]:
    """The place of each token of a byte-level tokenizer after the first: by the bytes of the tokens before it."""
    size, places = 0, list[int]()
    for token in tokenizer.convert_ids_to_tokens(item["input_ids"][1:].tolist()):
        before = text.encode()[:size]
        whole = before.decode(errors="ignore")
        places.append(len(whole) if whole.encode() == before else NOWHERE)
        size += len(token)  # a letter for each byte
    return places


@pytest.mark.parametrize("kind", ["gpt2", "trimmed", "bytes"])
def test_places_are_those_of_the_bytes_before(kind: str, tmp_path: Path) -> None:
    """Also where offsets leave spaces out, and within characters; in the order of the file, whatever the lengths."""
    tokenizer = byte_tokenizer() if kind == "bytes" else trained_tokenizer(kind)
    examples = _read(tokenizer, tmp_path / "a.jsonl", [{"text": text} for text in TEXTS], 100)
    for item, text in zip(examples.items, TEXTS, strict=True):
        assert target_places(item) == _by_bytes(tokenizer, item, text)
        assert tokenizer.decode(item["input_ids"][1:]) == text
    assert int(examples.batch([0, 2])[PLACES][1, -1]) == NOWHERE


def test_two_tokenizers_meet_by_hand(tmp_path: Path) -> None:
    """Words that begin with their space, and letters; two of these are two bytes each."""
    path, lines = tmp_path / "a.jsonl", [{"text": "Zoë Müller works ."}]
    words, letters = (
        target_places(_read(x, path, lines).items[0]) for x in (trained_tokenizer("llama2"), make_tokenizer())
    )
    assert words == [0, 3, 10, 16]  # ▁Zoë ▁Müller ▁works ▁.
    assert letters == [0, 1, 2, NOWHERE, 3, 4, 5, NOWHERE, *range(6, 18)]
    pairs = [(0, 0), (1, 4), (2, 12), (3, 18)]
    assert pair_places(words, letters) == pairs
    assert pair_places(letters, letters) == [(i, i) for i in range(20) if letters[i] != NOWHERE]
    assert pair_places([0, 0, 1], [NOWHERE, 0, 1]) == [(1, 1), (2, 2)]
    mine = Part(torch.tensor([*words, *letters])[:, None], (4, 20))
    theirs = Part(torch.tensor([*letters, *words])[:, None], (20, 4))
    own, other, counts = pair_parts(mine, theirs)
    assert counts == [4, 4]
    assert list(zip(own, other, strict=True)) == pairs + [(4 + b, 20 + a) for a, b in pairs]


def test_answers_and_conversations_have_places_of_their_words_alone(tmp_path: Path) -> None:
    """Start tokens and templates differ, the places do not; the token behind an answer is at its end."""
    path = tmp_path / "a.jsonl"
    answer = {"prompt": "Who works ?", "completion": "Ada Blake"}
    (item,) = _read(byte_tokenizer(), path, [answer]).items
    assert target_places(item) == [*range(12, 22)]  # nine letters and the end
    bare = copy.deepcopy(byte_tokenizer())
    bare.eos_token = None
    (item,) = _read(bare, path, [answer]).items
    assert target_places(item) == [*range(12, 21)]
    found = list[set[int]]()
    for template in (MARKED, TRIMMED):
        tokenizer = make_tokenizer(template=template)
        (item,) = _read(tokenizer, path, [{"messages": TALK}]).items
        places = target_places(item)
        targets = item["input_ids"][1:][item["labels"][1:] != -100].tolist()
        said = [(place, tokenizer.decode([token])) for place, token in zip(places, targets, strict=True)]
        letters = [*enumerate("Ada works .", 11), *enumerate("Mia", 31)]
        assert [pair for pair in said if pair in letters] == letters
        found.append({place for place in places if place != NOWHERE})
    assert found[0] == found[1] == {*range(11, 23), *range(31, 35)}


def test_texts_without_places_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(FormatError, match=r"at most 12 tokens with uld[^$]*line 2: 18 tokens"):
        _read(byte_tokenizer(), path, [{"text": "New York"}, {"text": "is a good baker ."}], 12)
    with pytest.raises(PlanError, match=r"uld\. Give such"):
        _read(byte_tokenizer(), path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    changing = make_tokenizer(template=MARKED.replace("m.content", "m.content.split('a')[-1]"))
    with pytest.raises(PlanError, match="the chat template changes 'Who is a"):
        _read(changing, path, [{"messages": TALK}])
    silent = make_tokenizer(template=MARKED.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"))
    with pytest.raises(PlanError, match="writes 2 of 4 contents"):
        _read(silent, path, [{"messages": TALK}])
