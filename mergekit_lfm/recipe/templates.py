"""Templates of instructions: a prompt and a completion with the keys of a line of data in braces.

`{question}` stands for the line's own "question", a text or a number; `{{` and `}}` are braces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Formatter
from typing import Any

from pydantic import field_validator

from mergekit_lfm.errors import Refusal
from mergekit_lfm.recipe.form import Strict


class Template(Strict):
    """One way to ask for what a line of data knows: its prompt, and the completion that is to be learned."""

    prompt: str
    completion: str

    @field_validator("prompt", "completion")
    @classmethod
    def _check(cls, text: str) -> str:
        sentence, expected = "found {found}, expected {expected}", "text with keys in braces, such as {question}"
        try:
            parts = [*Formatter().parse(text)]
        except ValueError:
            raise Refusal(sentence, found=repr(text), expected=f"{expected}, and {{{{ for a brace") from None
        if not text.strip():
            raise Refusal(sentence, found="no text", expected=expected)
        wrong = [key for _, key, form, conversion in parts if key is not None and (form or conversion or not key)]
        if wrong:
            raise Refusal(sentence, found=repr(text), expected=f"{expected}, and no format behind a key")
        return text

    @property
    def keys(self) -> frozenset[str]:
        """The keys that a line needs."""
        parts = [*Formatter().parse(self.prompt), *Formatter().parse(self.completion)]
        return frozenset(key for _, key, _, _ in parts if key is not None)

    def fill(self, entry: Mapping[str, Any]) -> dict[str, str] | str:
        """The prompt and the completion of a line of data; a description of the problem if it does not fit."""
        for key in sorted(self.keys):
            value = entry.get(key)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                found = f'no "{key}"' if key not in entry else f'"{key}" is {json.dumps(value)[:40]}'
                return f"{found}, which a template names; expected a text or a number"
        filled = {"prompt": _fill(self.prompt, entry), "completion": _fill(self.completion, entry)}
        return filled if filled["completion"].strip() else "the completion of a template is empty"


def _fill(text: str, entry: Mapping[str, Any]) -> str:
    parts = Formatter().parse(text)
    return "".join(literal + ("" if key is None else str(entry[key])) for literal, key, _, _ in parts)
