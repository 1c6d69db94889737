"""Offsite tuning: a shallow stand-in of a model, whose first and last layers are tuned and then put into the model.

The emulator is a stack of the model's layers: all of its ends, and some of its middle, evenly spaced. Its folder has
the recipe of that stack, which every tuning takes along, so that the ends are found again; that the rest is the model's
is seen from the bytes. Source: Xiao, Lin, Han 2023, arXiv 2302.04870, sections 3.2 and 3.3; unlike there the emulator
is not distilled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mergekit_lfm.api.arguments import StrPath
from mergekit_lfm.api.merge import merge
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.arch.heads import HEAD
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.output.card import CONFIG
from mergekit_lfm.plan.stack import Stack, find_stack
from mergekit_lfm.plan.student import ranges_of, spread
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_text
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.store.yaml import read_yaml
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.quantisation import dequantise

T = TypeVar("T")

SHOWN = 5  # differences in a message
Range = tuple[int, int]  # the first layer, and the one behind the last


@dataclass(frozen=True, slots=True)
class Emulator:
    """A stand-in of a model. layers: those of the model that it has. of: how many the model has. ends: at each end.

    train: patterns for `tune` that train the ends, and the head of a classifier.
    """

    layers: tuple[int, ...]
    of: int
    ends: int
    train: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PluggedIn:
    """A model with tuned ends. tuned: the layers from the tuned emulator. of: how many layers there are."""

    tuned: tuple[int, ...]
    of: int


def emulate_model(
    model: StrPath,
    out: StrPath,
    *,
    ends: int = 2,
    keep: float = 0.5,
    memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Emulator]:
    """Write an emulator of a model: its first and last `ends` layers, and a share of those between, evenly spaced.

    keep: that share; at least one layer between is kept unless it is 0, and at least one is left out. The outcome's
    digest is that of the merge's plan. Raises PlanError for a model with too few layers, and as `merge` does.
    """
    source = dequantise(open_model(model))
    stack = find_stack(source, os.fspath(model))
    count = len(stack.layers)
    middle = count - 2 * ends
    if ends < 1 or middle < 1:
        raise PlanError(
            f"ends: found {ends}, and {os.fspath(model)} has {count} layers; expected 1 to {(count - 1) // 2}, so that "
            "there are layers between the ends"
        )
    if not 0 <= keep < 1:
        raise PlanError(f"keep: found {keep}; expected a share of the layers between the ends, from 0 to below 1")
    chosen = [ends + layer for layer in spread(middle, min(middle - 1, max(round(keep * middle), int(keep > 0))))]
    ranges = [(0, ends), *ranges_of(chosen), (count - ends, count)]
    layers = tuple(layer for span in ranges for layer in range(*span))
    trained = (*range(ends), *range(len(layers) - ends, len(layers)))
    heads = [name for name in stack.late if HEAD.search(name)] if _is_classifier(source) else []
    train = (*(f"*{stack.prefix}{layer}.*" for layer in trained), *(f"*{name}" for name in heads))
    made = Emulator(layers, count, ends, train)
    how: dict[str, Any] = {"memory": memory, "threads": threads, "overwrite": overwrite, "progress": progress}
    return _stack([(model, span) for span in ranges], out, made, how)


def _stack(parts: Sequence[tuple[StrPath, Range]], out: StrPath, result: T, how: Mapping[str, Any]) -> Outcome[T]:
    """Write a model of these layers of models, in order; the outcome has the result. how: options of `merge`."""
    slices = [{"sources": [{"model": os.fspath(of), "layer_range": [*span]}]} for of, span in parts]
    done = merge({"merge_method": "passthrough", "slices": slices}, out, **how)
    return Outcome(done.path, result, done.digest, done.already_there, done.warnings, done.seconds)


def _is_classifier(model: Checkpoint) -> bool:
    return any("Classification" in str(kind) for kind in model.config.get("architectures") or ())


def plug_in_ends(
    model: StrPath,
    emulator: StrPath,
    out: StrPath,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[PluggedIn]:
    """Write a model with the ends of its tuned emulator: their layers, and what is trained beside them, the head.

    emulator: a folder that `tune` has made of what `emulate_model` wrote, or EMULATOR+ADAPTER. Reads both models once.
    Raises PlanError for an emulator of another model, or one with other tuned parts than its ends.
    """
    named, tuned, source = os.fspath(emulator), dequantise(open_model(emulator)), dequantise(open_model(model))
    sidecars_of(tuned)  # fetches the other files of a model on the Hub
    stack, other = find_stack(source, os.fspath(model)), find_stack(tuned, named)
    ranges = _ranges_of(tuned, named)
    count, (_, first), (last, stop) = len(stack.layers), ranges[0], ranges[-1]
    if (stop, sum(b - a for a, b in ranges)) != (count, len(other.layers)):
        raise PlanError(
            f"{named} has {len(other.layers)} layers and is of a model of {stop}, but {os.fspath(model)} has {count}; "
            "give the model that the emulator was made from"
        )
    kept = [layer for span in ranges[1:-1] for layer in range(*span)]
    _refuse_others(os.fspath(model), named, [*_differences(source, tuned, stack, kept, first)])
    back = len(other.layers) - (stop - last)
    spans: list[tuple[StrPath, Range]]
    spans = [(emulator, (0, first)), (model, (first, last)), (emulator, (back, len(other.layers)))]
    how: dict[str, Any] = {"memory": memory, "threads": threads, "overwrite": overwrite, "progress": progress}
    return _stack(spans, out, PluggedIn((*range(first), *range(last, count)), count), how)


def _ranges_of(tuned: Checkpoint, label: str) -> list[Range]:
    """The ranges of layers that an emulator was made from, by the recipe in its folder."""
    file = tuned.path / CONFIG
    expected = "expected the recipe of an emulator, which `mergekit-lfm offsite emulate` writes and `tune` keeps"
    if not file.is_file():
        raise PlanError(f"{label} has no {CONFIG}; {expected}. Give such a folder, tuned")
    recipe: Any = read_yaml(read_text(file), str(file))
    try:
        sources = [source for each in recipe["slices"] for source in each["sources"]]
        ranges = [(int(a), int(b)) for a, b in (source["layer_range"] for source in sources)]
        plain = recipe["merge_method"] == "passthrough" and len(sources) == len(recipe["slices"])
        plain = plain and len({str(source["model"]) for source in sources}) == 1
    except (KeyError, TypeError, ValueError):
        plain, ranges = False, []
    bounds = [bound for span in ranges for bound in span]
    if not plain or len(ranges) < 2 or bounds[0] or bounds != sorted(bounds):
        raise PlanError(f"{file}: found another recipe; {expected}. Give a tuned emulator")
    return ranges


def _differences(source: Checkpoint, tuned: Checkpoint, stack: Stack, kept: Sequence[int], first: int) -> Iterator[str]:
    """The tensors of a tuned emulator, ends and heads apart, that are not the model's."""
    pairs = [(name, name) for name in (*stack.early, *stack.late) if not HEAD.search(name)]
    for number, layer in enumerate(kept, first):
        pairs += [(name, stack.places[name].named(number)) for name in stack.layers[layer]]
    for mine, theirs in pairs:
        if theirs not in tuned:
            yield f"{theirs} is not there"
        elif tuned[theirs].shape != source[mine].shape or tuned[theirs].dtype != source[mine].dtype:
            yield f"{theirs} is {tuned[theirs].dtype} {list(tuned[theirs].shape)}, unlike {mine}"
        elif tuned.digest_of(theirs) != source.digest_of(mine):
            yield f"{theirs} has other numbers than {mine}"


def _refuse_others(model: str, emulator: str, differences: Sequence[str]) -> None:
    if differences:
        more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        listed = "\n  ".join([*differences[:SHOWN], *more])
        raise PlanError(
            f"{emulator} is not an emulator of {model}, or more than its ends was tuned; these are not the model's:\n"
            f"  {listed}\nGive the model that it was made from, and tune with the --train that `emulate` prints"
        )
