"""The two errors a user can cause. Both are ValueErrors; the command line prints their text and exits with code 2."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

PARTS = ("place", "found", "expected", "cure")


class Refusal(ValueError):
    """A message for a user, and in `parts` those of its parts that are known: place, found, expected, cure.

    sentence: the message, with the names of the words in braces where they stand in it, as in "{place} exists; {cure}".
    Without words it is the message as it is.
    """

    def __init__(self, sentence: str, **words: object) -> None:
        super().__init__(sentence.format(**words) if words else sentence)
        self.parts = {name: str(words[name]) for name in PARTS if words.get(name, "") != ""}


class FormatError(Refusal):
    """A file is not what it claims to be: truncated, overlapping, of an unknown dtype, or a pointer to the weights."""


class PlanError(Refusal):
    """A recipe cannot be carried out on these inputs: unknown keys, differing tensors, too little memory or disk."""


def reason(error: BaseException) -> str:
    """The class and the first line of another library's error; a KeyError is unclear without its class."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def several(what: str, problems: Sequence[str], most: int = 100) -> str:
    """One message about all problems, one per line; it lists the first `most` and counts the rest."""
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return f"{what}, {len(problems)} problems:\n  " + "\n  ".join([*problems[:most], *more])


def shorten(names: Sequence[str], most: int = 10) -> str:
    """The first names in one line, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def several_errors(what: str, errors: Sequence[PlanError]) -> PlanError:
    """One error about all of them: the only one as it is, with its parts."""
    return errors[0] if len(errors) == 1 else PlanError(several(what, [*map(str, errors)]))


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message: the known word nearest to `word`, or all of them if none is near."""
    names = sorted(known)
    near = get_close_matches(str(word).lower(), names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"known here: {', '.join(names)}" if names else "no names are known here"
