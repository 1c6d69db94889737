"""Models with adapters, as text: MODEL+ADAPTER, each with a revision, several in turn; a share as in MODEL+0.5*ADAPTER.

A path may have a plus sign itself, so what exists under the longer name is that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lfm.store.elsewhere import Elsewhere

PLUS, TIMES = "+", "*"
# Of an adapter, and of its own scale: the root of the largest float32, so that one times the other is in its range.
LARGEST_SHARE = 1e19
_SCALED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)\s*\*\s*(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter that a model is read with: as written, where it is, and the share of what it does."""

    ref: str
    source: Path | Elsewhere
    scale: float = 1.0


def split_reference(text: str, exists: Callable[[str], bool]) -> tuple[str, list[tuple[str, float]]]:
    """The model in a text MODEL+SCALE*ADAPTER+..., and the adapters with their scales.

    exists: whether a path is there, which then is not split.
    """
    parts = text.split(PLUS)
    if len(parts) == 1:
        return text, []
    pieces, at = list[str](), 0
    while at < len(parts):
        ends = range(len(parts), at + 1, -1)
        end = next((end for end in ends if exists(_unscaled(PLUS.join(parts[at:end]))[0])), at + 1)
        pieces.append(PLUS.join(parts[at:end]))
        at = end
    if not all(pieces):
        return text, []
    return pieces[0], [_unscaled(piece) for piece in pieces[1:]]


def _unscaled(piece: str) -> tuple[str, float]:
    """The adapter in SCALE*ADAPTER, and the scale."""
    match = _SCALED.fullmatch(piece)
    return (piece, 1.0) if match is None else (match[2], float(match[1]))


def join_reference(model: str, adapters: Iterable[tuple[str, float]], *, ones: bool = False) -> str:
    """The text that `split_reference` takes apart. ones: True to write a scale of 1, too, which no path is like."""
    plain = 1 if not ones else None
    return PLUS.join([model, *(ref if scale == plain else f"{_text_of(scale)}{TIMES}{ref}" for ref, scale in adapters)])


def _text_of(scale: float) -> str:
    """The shortest text that is read as this number, without a plus sign."""
    return repr(scale).replace("e+", "e").removesuffix(".0")


def model_of(text: str, adapters: Sequence[AdapterRef]) -> str:
    """The model in a text whose adapters are known."""
    for adapter in reversed(adapters):
        text = text[: text.rindex(PLUS, 0, text.rindex(adapter.ref))]
    return text


def names_in(text: str) -> list[str]:
    """The names that a text may be made of: those of stages have no plus sign."""
    return [_unscaled(part)[0] for part in text.split(PLUS)]
