"""Rules of a classification by words: a template with places for words, and for each class the words that make it.

template: "{text} This text about [MASK] is [MASK]."
classes: # the first is label 0
  - [science, old]
  - [science, new]
  - [music, new]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.files import read_small_text
from mergekit_lfm.store.yaml import read_yaml

TEXT, PLACE = "{text}", "[MASK]"


@dataclass(frozen=True, slots=True)
class Rules:
    """A template that has `TEXT` once and some places, `PLACE`; for each class a word for each place, in order."""

    template: str
    classes: tuple[tuple[str, ...], ...]

    @property
    def sides(self) -> tuple[str, str]:
        """The template before the text, and after it."""
        before, _, after = self.template.partition(TEXT)
        return before, after

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """For each place the words that some class has there, each once, in the order of the classes."""
        return tuple(tuple(dict.fromkeys(words)) for words in zip(*self.classes, strict=True))


def read_rules(file: Path) -> Rules:
    """The rules in a YAML or JSON file. Raises FormatError for other files, with all problems."""
    return make_rules(read_yaml(read_small_text(file), str(file)), file)


def make_rules(data: object, label: object) -> Rules:
    """The rules in a mapping. Raises FormatError, which names `label`, with all problems."""
    problems = [*_problems(data)]
    if problems:
        listed = "\n  ".join(problems)
        raise FormatError(
            f"{label}: expected a template with {TEXT} and {PLACE}, and classes, a list of words for each:\n  {listed}"
        )
    assert isinstance(data, Mapping)
    return Rules(data["template"], tuple(tuple(words) for words in data["classes"]))


def _problems(data: object) -> Iterator[str]:
    """The problems of a mapping that is to be rules."""
    if not isinstance(data, Mapping) or data.keys() != {"template", "classes"}:
        found = ", ".join(map(str, data)) if isinstance(data, Mapping) else f"{data!r:.60}"
        yield f"found {found or 'nothing'}; expected the keys template and classes"
        return
    template, classes = data["template"], data["classes"]
    places = template.count(PLACE) if isinstance(template, str) else 0
    if not places or template.count(TEXT) != 1:
        yield f"template: found {template!r:.80}; expected {TEXT} once, and {PLACE} for each word"
    if not isinstance(classes, list | tuple) or len(classes) < 2:
        yield f"classes: found {classes!r:.60}; expected two or more, the first of label 0"
        return
    for label, words in enumerate(classes):
        if not _are_words(words) or (places and len(words) != places):
            yield f"classes[{label}]: found {words!r:.60}; expected {places or 'some'} words, one for each {PLACE}"
        elif (first := classes.index(words)) < label:
            yield f"classes[{label}]: found the words of class {first}; expected others, which tell the two apart"


def _are_words(words: Any) -> bool:
    """Whether something is a list of texts."""
    return isinstance(words, Sequence) and not isinstance(words, str) and all(map(_is_word, words))


def _is_word(word: object) -> bool:
    return isinstance(word, str) and bool(word.strip())
