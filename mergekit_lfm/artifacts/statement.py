"""A text and its continuation, and the one rule by which the two are joined: for edits, traces and scores alike."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

# The first words of the names of characters in scripts without spaces between words, and of East Asian punctuation.
SPACELESS = {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH"}
SPACELESS |= {"THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}
OPENING = ("Ps", "Pi", "Pf", "Pd", "Pc", "Sc")  # brackets, quotation marks, dashes, ties, currencies
OPENING_MARKS = "\"'`/\\@#&*"  # of no such category


@dataclass(frozen=True, slots=True)
class Statement:
    """A text and its continuation. join: the text between them; None leaves it to `parts`."""

    prompt: str
    target: str
    join: str | None = None

    @property
    def parts(self) -> tuple[str, str]:
        """The prompt without blanks at its end, and the rest of the text as it is written.

        A blank at the end of the prompt or at the beginning of the target joins them, else `join` does. Without any of
        these a space does, but not after a script without spaces, an opening bracket, a quotation mark or a dash.
        """
        prompt = self.prompt.rstrip()
        blanks = self.prompt[len(prompt) :] or None
        if self.target[:1].isspace():
            return prompt, self.target
        between = blanks or self.join
        if between is None:
            between = " " if _takes_space(prompt) else ""
        return prompt, between + self.target


def _takes_space(prompt: str) -> bool:
    """True if a word after the prompt stands apart from it."""
    if not prompt:
        return False
    end = prompt[-1]
    letter = next((char for char in reversed(prompt) if char.isalpha()), end)  # digits are of the script around them
    if is_spaceless(end) or is_spaceless(letter):
        return False
    return unicodedata.category(end) not in OPENING and end not in OPENING_MARKS


def is_spaceless(char: str) -> bool:
    """True for a character of a script that puts no spaces between words."""
    return unicodedata.name(char, "").partition(" ")[0].partition("-")[0] in SPACELESS
