"""Text for people, at the edge where it is shown: nothing in it controls a terminal, and no secret can be read."""

from __future__ import annotations

import re
from unicodedata import category

from mergekit_lfm.machine.secrets import mask_secrets

# Characters that act instead of being seen: controls, invisible formats such as changes of direction, lone surrogates,
# line and paragraph separators. Joiners are parts of words in Persian and Hindi, and of emoji.
ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"
# The line breaks of our own messages: before an indented line, and before a last one that says what to do.
OUR_BREAK = re.compile(r"\n(?=  |[A-Z][^\n]*\Z)")


def printable(text: object) -> str:
    """The text on its lines, with secrets masked and with acting characters escaped as in Python."""
    return "\n".join(map(printable_line, str(text).split("\n")))


def printable_line(text: object) -> str:
    """The same in one line: line breaks are escaped, too."""
    masked = mask_secrets(str(text))
    if masked.isprintable():
        return masked
    return "".join(_escape(char) if category(char) in ACTING and char not in JOINERS else char for char in masked)


def printable_message(text: object) -> str:
    """The same for a message of ours: line breaks are kept only where our messages have them."""
    return "\n".join(map(printable_line, OUR_BREAK.split(str(text))))


def strip_queries(text: str) -> str:
    """The text with the query strings of its URLs removed: they may hold signatures."""
    return re.sub(r"(https?://[^\s?]*)\?[^\s)]*", r"\1", text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
