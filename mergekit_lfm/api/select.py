"""`select_examples`: the examples of a pool that a classifier would learn most from, in order."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.judge.candidates import CHANGES, predictions, worth
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.runtime.lines import read_lines
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.files import read_text
from mergekit_lfm.store.places import check_file
from mergekit_lfm.views.adapted import with_adapters


@dataclass(frozen=True, slots=True)
class Selected:
    """Examples of a pool, the most worth first. lines: their numbers there; worth: of each. pool: how many it has."""

    lines: tuple[int, ...]
    worth: tuple[float, ...]
    pool: int


def select_examples(
    model: StrPath,
    data: StrPath,
    out: StrPath,
    *,
    most: int | None = None,
    change: str = "delete",
    share: float = 0.2,
    copies: int = 8,
    entropy: float = 1.0,
    diversity: float = 1.0,
    majority: float = 0.5,
    window: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Selected]:
    """Write the lines of a pool of texts that a classifier would learn most from, in order, as they are in the pool.

    data: a .jsonl or .txt file; labels are not needed. most: how many lines, None for all. change: how copies of a text
    are made: a `share` of its tokens is deleted ("delete") or masked ("mask"); copies: of each text. entropy,
    diversity, majority: as of `worth` in `judge.candidates`. Among equals the first line of the pool comes first.

    Raises PlanError for settings out of range, and if `out` exists without `overwrite`; FormatError for a file without
    texts.
    """
    started = time.monotonic()
    _check(most=most, change=change, share=share, copies=copies, majority=majority, weights=(entropy, diversity))
    file, place = expand(data, "data"), expand(out)
    lines = read_lines(file, whole=False)
    if place.suffix != file.suffix:
        raise PlanError(f"{place}: found the suffix {place.suffix or '(none)'}; expected {file.suffix}, the pool's")
    folder = model_folder(model)
    check_file(place, [file, folder], overwrite=overwrite)
    loaded = load_model(with_adapters(folder), "classification", device=device)
    with progress.by_count(" texts", "judging") as count:
        logs = predictions(
            loaded,
            [line.text for line in lines],
            copies=copies,
            change=change,
            share=share,
            window=window,
            batch_size=batch_size,
            seed=seed,
            count=count,
        )
    scores = [worth(each, entropy=entropy, diversity=diversity, majority=majority) for each in logs]
    order = sorted(range(len(lines)), key=lambda i: -scores[i])[:most]
    raw = read_text(file, most=None)
    pool = raw.splitlines() if file.suffix == ".txt" else raw.split("\n")
    chosen = [pool[lines[i].number - 1].rstrip("\r") for i in order]
    replace_file(place, "".join(f"{text}\n" for text in chosen).encode())
    selected = Selected(tuple(lines[i].number for i in order), tuple(scores[i] for i in order), len(lines))
    return Outcome(place, selected, seconds=time.monotonic() - started)


def _check(
    *, most: int | None, change: str, share: float, copies: int, majority: float, weights: tuple[float, float]
) -> None:
    """Raise PlanError for settings out of range, with all of them."""
    problems = [f"most is {most}; expected at least 1"] if most is not None and most < 1 else []
    if change not in CHANGES:
        problems.append(f"change is {change!r}; expected {' or '.join(CHANGES)}; {did_you_mean(change, CHANGES)}")
    problems += [f"copies is {copies}; expected at least 2, which are compared"] if copies < 2 else []
    for name, value in (("share", share), ("majority", majority)):
        problems += [] if 0 < value <= 1 else [f"{name} is {value}; expected a share above 0, up to 1"]
    if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        problems.append(f"entropy and diversity are {weights[0]} and {weights[1]}; expected numbers from 0, one above")
    if problems:
        raise PlanError("; ".join(problems))
