"""`evaluate_routed`: judge several experts together, each on the texts that are most like those it was tuned on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.elsewhere import shown_name
from mergekit_lfm.views.adapted import with_adapters

if TYPE_CHECKING:
    from mergekit_lfm.judge.evaluate import Accuracy, Perplexity
    from mergekit_lfm.runtime.load import Loaded

Files = StrPath | Sequence[StrPath]


@dataclass(frozen=True, slots=True)
class Routed:
    """How good experts are together. scores: by file. chosen: how many of its texts each expert was sent, by file."""

    scores: Mapping[str, Perplexity | Accuracy]
    chosen: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Expert:
    """An expert among others: its name, files of its kind of texts, and a function that loads it."""

    name: str
    files: tuple[Path, ...]
    load: Callable[[], Loaded]


def evaluate_routed(
    experts: Mapping[str, Files],
    data: Files,
    *,
    task: str = "lm",
    encoder: StrPath | None = None,
    window: int | None = None,
    stride: int | None = None,
    device: str = "cpu",
) -> Outcome[Routed]:
    """Send each text of data files to the expert whose own texts are most like it, and score it by that one.

    experts: models (folders, names on the Hub, MODEL+ADAPTER), each with files of its kind of texts, such as those that
    it was tuned on. data: .jsonl or .txt files as `evaluate_models` takes them. task: "lm" or "classification".
    encoder: a model of sentences that says how alike texts are; by default n-grams do. One model is in memory at a
    time. Raises PlanError for fewer than two experts, FormatError for files that do not fit.
    """
    from mergekit_lfm.api.attachments import load_attached

    started = time.monotonic()
    if len(experts) < 2:
        raise PlanError(f"found {len(experts)} expert; expected two or more to choose from. Add some")
    if task not in ("lm", "classification") or (stride is not None and task != "lm"):
        raise PlanError(f"found the task {task!r}; expected lm or classification, and a stride for lm alone")
    paths = {str(file): expand(file, "data") for file in _as_list(data)}
    made = [
        Expert(
            shown_name(str(model), model_folder(model)),
            tuple(expand(file) for file in _as_list(own)),
            partial(load_attached, model_folder(model), task, device=device),
        )
        for model, own in experts.items()
    ]
    routed = judge_routed(made, paths, task, encoder=encoder, window=window, stride=stride, device=device)
    return Outcome(None, routed, seconds=time.monotonic() - started)


def judge_routed(
    experts: Sequence[Expert],
    paths: Mapping[str, Path],
    task: str,
    *,
    encoder: StrPath | None = None,
    window: int | None = None,
    stride: int | None = None,
    device: str = "cpu",
) -> Routed:
    """The same for experts that are checked. paths: of the data, by their names."""
    from mergekit_lfm.judge.route import add_up, read_routed, read_texts, score_part

    kinds = [[text for file in expert.files for text in read_texts(file)] for expert in experts]
    texts = {name: read_routed(path, task) for name, path in paths.items()}
    choices = _choose(kinds, texts, encoder, device)
    names = [expert.name for expert in experts]
    parts: dict[str, list[Perplexity | Accuracy]] = {name: [] for name in paths}
    for number, expert in enumerate(experts):
        mine = {name: [i for i, choice in enumerate(own) if choice == number] for name, own in choices.items()}
        if any(mine.values()):
            loaded = expert.load()
            for name, numbers in mine.items():
                if numbers:
                    score = score_part(loaded, paths[name], texts[name], numbers, window=window, stride=stride)
                    parts[name].append(score)
            del loaded
    chosen = {
        name: {expert: own.count(i) for i, expert in enumerate(names) if i in own} for name, own in choices.items()
    }
    return Routed({name: add_up(scores) for name, scores in parts.items()}, chosen)


def _choose(
    kinds: Sequence[Sequence[str]], texts: Mapping[str, Sequence[str]], encoder: StrPath | None, device: str
) -> dict[str, list[int]]:
    """The number of the expert for each text, by file."""
    from mergekit_lfm.judge.route import Router, choose_by_encoder

    if encoder is None:
        router = Router(kinds)
        return {name: [router.choose(text) for text in own] for name, own in texts.items()}
    from mergekit_lfm.runtime.load import load_model

    loaded = load_model(with_adapters(model_folder(encoder)), "embedding", device=device)
    return {name: choose_by_encoder(loaded, kinds, own) for name, own in texts.items()}


def _as_list(files: Files) -> list[StrPath]:
    return [files] if isinstance(files, str | os.PathLike) else [*files]
