"""`synthesise`: one function for all presets: images without data, and a student that learned from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.generate import Generation, generate
from mergekit_lfm.distill.generators import Generator, build
from mergekit_lfm.distill.invert import Facts, Inversion, invert
from mergekit_lfm.distill.learner import Learner, Learning, learn
from mergekit_lfm.distill.metadata import Clusters, with_records
from mergekit_lfm.distill.passes import Moments, batch_norms, last_linear
from mergekit_lfm.distill.presets import DESCRIBED, Preset, find_preset
from mergekit_lfm.distill.samples import Samples
from mergekit_lfm.distill.wild import choose_wild
from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.train.examples import seed_of

S = TypeVar("S")
Tell = Callable[[int, int, Mapping[str, Any]], None]
Options = Mapping[str, Any]
NO_OPTIONS: Options = MappingProxyType({})


@dataclass(frozen=True)
class Given:
    """Facts that a user has besides a teacher. records, clusters: of it on its data. images: of another kind."""

    records: Mapping[str, Moments] | None = None
    clusters: Clusters | None = None
    images: Tensor | None = None


@dataclass(frozen=True)
class Synthesis:
    """Images, and the course of their making: the terms at the end of a batch or a round, and the student's losses."""

    samples: Samples
    record: tuple[Mapping[str, float], ...]
    losses: tuple[float, ...]


def synthesise(
    teacher: nn.Module,
    student: nn.Module | None,
    preset: str | Preset,
    shape: tuple[int, int, int],
    *,
    given: Given | None = None,
    count: int = 256,
    student_steps: int = 1200,
    low: float = 0.0,
    high: float = 1.0,
    seed: int = 0,
    tell: Tell | None = None,
    inversion: Options = NO_OPTIONS,
    generation: Options = NO_OPTIONS,
    learning: Options = NO_OPTIONS,
) -> Synthesis:
    """Make images for a teacher by a preset, and train a student on them, in place.

    shape: of an image, channels, height and width; low, high: the range of its pixels. count: images that are made or
    chosen; student_steps: on these. A generator makes new ones for each of its rounds instead. Without a student,
    presets that need none only make images. inversion, generation, learning: settings of `Inversion`, `Generation` and
    `Learning` in place of the preset's. A teacher without BatchNorm needs records, which take its place. Raises
    PlanError with all that a preset needs and is not given.
    """
    row = find_preset(preset) if isinstance(preset, str) else preset
    given = given or Given()
    row = _fit(row, teacher, student, given)
    how = _settle(Inversion, {"low": low, "high": high, **row.inversion, **inversion})
    study = _settle(Learning, {**row.learning, **learning})
    if row.family == "generator":
        assert student is not None
        making = _settle(Generation, {**row.generation, **generation})
        return _by_generator(teacher, student, row, shape, given, (low, high), making, study, seed, tell)
    losses, samples, steps = list[float](), None, -(-student_steps // row.rounds)
    lines, size = list[Mapping[str, float]](), -(-count // row.rounds)
    classes = last_linear(teacher).out_features
    learner = None if student is None else Learner(student, classes, study, steps * row.rounds, seed)
    for number in range(row.rounds):
        if row.family == "wild":
            assert given.images is not None
            new = choose_wild(teacher, given.images, count)
        else:
            facts = Facts(student if number else None, given.records, given.clusters)
            terms = row.terms if number else {k: v for k, v in row.terms.items() if k != "competition"}
            tells = _keep_last(lines, tell)
            own = seed_of(seed, "round", number)
            new = invert(teacher, terms, shape, size, options=how, facts=facts, seed=own, tell=tells)
        samples = new if samples is None else _join(samples, new)
        if learner is not None:
            losses += learn(learner, (samples.images, samples.scores), steps)
    assert samples is not None
    return Synthesis(samples, tuple(lines), tuple(losses))


def _fit(row: Preset, teacher: nn.Module, student: nn.Module | None, given: Given) -> Preset:
    """The preset as it is for this teacher. Raises PlanError with everything that it needs and is not given."""
    if "bn" in row.terms and not batch_norms(teacher) and given.records:
        row = replace(row, terms=with_records(row.terms, given.records))
    present = {
        "batch_norm": bool(batch_norms(teacher)),
        "records": bool(given.records),
        "clusters": given.clusters is not None,
        "proxy": given.images is not None,
        "wild": given.images is not None,
    }
    lacking = [DESCRIBED[name] for name in row.needs if not present[name]]
    if student is None and (row.family != "pixels" or row.rounds > 1):
        lacking.append("a student, which takes part in making the images")
    if lacking:
        raise PlanError(f"{row.name} needs {'; and '.join(lacking)}. Give it, or choose another preset")
    return row


def _settle(kind: Callable[..., S], values: Mapping[str, Any]) -> S:
    """Settings of a class by their names. Raises PlanError for a name that it does not have."""
    known = [*signature(kind).parameters]
    for name in values:
        if name not in known:
            raise PlanError(f"found the option {name!r}; {did_you_mean(name, known)}")
    return kind(**values)


def _by_generator(
    teacher: nn.Module,
    student: nn.Module,
    row: Preset,
    shape: tuple[int, int, int],
    given: Given,
    pixels: tuple[float, float],
    generation: Generation,
    learning: Learning,
    seed: int,
    tell: Tell | None,
) -> Synthesis:
    classes = last_linear(teacher).out_features if generation.conditional else 0
    generator = build(
        lambda: Generator(shape, classes=classes, low=pixels[0], high=pixels[1]), seed_of(seed, "generator")
    ).to(next(teacher.parameters()).device)
    made = generate(
        teacher,
        student,
        generator,
        row.terms,
        options=generation,
        learning=learning,
        records=given.records,
        proxy=given.images,
        seed=seed,
        tell=tell,
    )
    return Synthesis(made.samples, made.record, tuple(line["student"] for line in made.record))


def _keep_last(lines: list[Mapping[str, float]], tell: Tell | None) -> Tell:
    """Hears the steps of an inversion, and keeps the terms at the end of each batch."""

    def hear(done: int, count: int, values: Mapping[str, Any]) -> None:
        if done == count:
            lines.append(values)
        if tell is not None:
            tell(done, count, values)

    return hear


def _join(first: Samples, second: Samples) -> Samples:
    return Samples(torch.cat([first.images, second.images]), torch.cat([first.scores, second.scores]))
