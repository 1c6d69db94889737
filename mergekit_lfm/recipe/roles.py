"""Read the models of a part of a recipe, assign them their roles in its method, and check their settings.

A check returns its problems, each with its place in the recipe, so that a user sees all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.methods.method import Method
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.align import AlignRequest, read_align_request
from mergekit_lfm.recipe.edit import read_edit_request
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import ModelEntry
from mergekit_lfm.recipe.parts import Edit, Input, Part, Scope, Slice
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at
from mergekit_lfm.recipe.rename import RenameRule, read_rename
from mergekit_lfm.recipe.values import NamedFile, Setting, read_setting
from mergekit_lfm.store.elsewhere import Elsewhere

# Parameters of mergekit that never change a result.
_WITHOUT_EFFECT = {"int8_mask": "masks take no memory to speak of"}


def read_base(ref: str | None, where: Where, place: str) -> tuple[Input | None, list[Problem]]:
    """The base model that a recipe names."""
    if ref is None:
        return None, []
    found, problems = _read_source(ref, where, place)
    return Input(found.ref, found.source, found.ref, found.adapters, place=place), problems


def read_scope(raw: Mapping[str, Any], methods: Sequence[Method], place: str) -> tuple[Scope, list[str], list[Problem]]:
    """The settings of a mapping `parameters` for the first of the methods, notices and problems.

    methods: all that the recipe merges with; a parameter may be for one of the others.
    """
    settings, notices, problems = read_settings(raw, methods, place, own=False)
    return Scope(place, settings), notices, problems


def assign_roles(
    methods: Sequence[Method],
    models: Sequence[ModelEntry],
    base: Input | None,
    scopes: tuple[Scope, ...],
    where: Where,
    *,
    place: str = "models",
    module: str | None = None,
    slice: Slice | None = None,
) -> tuple[Part, list[str], list[Problem]]:
    """The part of a recipe that the first of `methods` makes from `models`; notices and problems.

    base: in a slice or a module it is an input only where it is listed, unless the method subtracts it.
    """
    lines, notices, problems = list[Input](), list[str](), list[Problem]()
    for i, entry in enumerate(models):
        line, told, wrong = _read_line(entry, f"{place}[{i}]", methods, base, lines, where)
        if base is not None and replace(line, rename=()) == base:
            base = replace(base, rename=line.rename)
        lines.append(line)
        notices += told
        problems += wrong
    lines, wrong_aligns = _read_aligns(models, lines, base, where)
    method = methods[0]
    if method.base == "member" and place != "models" and base not in lines:
        base = None
    if base is not None and base in lines:
        base = replace(base, layers=next(line.layers for line in lines if line == base))
    elif base is not None:
        spans = {line.layers for line in lines}
        if len(spans) > 1:
            text = f"{base.ref}, the base, is not among the sources of this slice, which have different layers; list it"
            problems.append(Problem(place, text))
        base = replace(base, layers=next(iter(spans), None))
    inputs, of_base = _choose_inputs(method, base, lines, whole=place == "models")
    part = Part(method.name, base, tuple(lines), inputs, scopes, place, module, slice)
    return part, [*notices, *of_base], [*problems, *wrong_aligns]


def _read_line(
    entry: ModelEntry,
    place: str,
    methods: Sequence[Method],
    base: Input | None,
    before: Sequence[Input],
    where: Where,
) -> tuple[Input, list[str], list[Problem]]:
    """The model of a line, all but its alignment. before: the lines above."""
    found, problems = _read_source(entry.model, where, f"{place}.model")
    settings, notices, wrong_settings = read_settings(entry.parameters, methods, f"{place}.parameters", own=True)
    stats, wrong_stats = _read_stats(entry.stats, methods[0], where, f"{place}.stats")
    edits, wrong_edits = read_edits(entry.edits, where, f"{place}.edits")
    rename, wrong_names = _read_rename(entry.rename, f"{place}.rename")
    problems += [*wrong_settings, *wrong_stats, *wrong_names, *wrong_edits]
    if edits and entry.stats is not None:
        text = (
            "the statistics describe the model before `edits` change it. Save the edited model with "
            "`mergekit-lfm patch apply`, collect its statistics, and merge that"
        )
        problems.append(Problem(place, text))
    if edits and entry.align is not None:
        text = (
            "one merge cannot do both `edits` and `align` of a model. Save the edited model with "
            "`mergekit-lfm patch apply`, and align that"
        )
        problems.append(Problem(place, text))
    named = Input(found.ref, found.source, found.ref, found.adapters)
    model = _name_model(named, base, before, apart=bool(entry.edits))
    line = replace(
        model, edits=edits, rename=rename, place=place, settings=settings, stats=stats, layers=entry.layer_range
    )
    return line, notices, problems


def _read_rename(raw: object, place: str) -> tuple[tuple[RenameRule, ...], list[Problem]]:
    """The checked rules for a model's names."""
    try:
        return () if raw is None else read_rename(raw), []
    except ValueError as wrong:
        return (), [Problem(place, line) for line in str(wrong).split("\n")]


def _read_source(ref: str, where: Where, place: str) -> tuple[FoundModel, list[Problem]]:
    """The model that a text names, and the adapters that it is read with."""
    found, problems = attempt(partial(find_reference, ref, where), place)
    return found or FoundModel(ref, Path(ref)), problems


def read_settings(
    raw: Mapping[str, Any], methods: Sequence[Method], place: str, *, own: bool
) -> tuple[dict[str, Setting], list[str], list[Problem]]:
    """The settings in a mapping `parameters`, notices and problems; `own` if it belongs to one model.

    A parameter of another method of the recipe is for that; one of any other merge method has no effect.
    """
    method, known = methods[0], {parameter.name: parameter for parameter in methods[0].parameters}
    others = {parameter.name for method in methods for parameter in method.parameters}
    elsewhere = {parameter.name for method in METHODS.values() for parameter in method.parameters}
    settings: dict[str, Setting] = {}
    notices: list[str] = []
    problems: list[Problem] = []
    for name, value in raw.items():
        at = f"{place}.{name}"
        if name in _WITHOUT_EFFECT:
            notices.append(f"{at} has no effect here: {_WITHOUT_EFFECT[name]}")
            continue
        if name in others and name not in known:
            continue
        if name in elsewhere and name not in known:
            notices.append(f"{at} has no effect here: {method.name} has no such parameter")
            continue
        if name not in known:
            cure = did_you_mean(name, known)
            text = "{method} has no such parameter, {cure}"
            problem = problem_at(at, text, method=method.name, found=name, cure=cure)
            problems.append(problem._replace(unknown=at))
            continue
        if own and not known[name].per_input:
            problems.append(Problem(at, f"{name} is shared by all inputs; move it to the top-level `parameters`"))
        setting, wrong = attempt(partial(read_setting, value, known[name]), at)
        problems += wrong
        if setting is not None:
            settings[name] = setting
    return settings, notices, problems


def _read_stats(ref: str | None, method: Method, where: Where, place: str) -> tuple[NamedFile | None, list[Problem]]:
    if ref is None:
        return None, []
    if method.statistics is None:
        text = f"{method.name} takes no statistics; remove the key, or choose a method that does"
        return None, [Problem(place, text)]
    return read_file(ref, where, place, "a file made by `mergekit-lfm stats`")


def read_edits(
    edits: Sequence[str | Mapping[str, Any]], where: Where, place: str
) -> tuple[tuple[Edit, ...], list[Problem]]:
    """The patch files, and checked requests for edits still to be made."""
    read: list[Edit] = []
    problems: list[Problem] = []
    for i, raw in enumerate(edits):
        at = f"{place}[{i}]"
        edit, wrong = (
            read_file(raw, where, at, "a patch file") if isinstance(raw, str) else read_edit_request(raw, where, at)
        )
        problems += wrong
        read += [] if edit is None else [edit]
    return tuple(read), problems


def _read_aligns(
    models: Sequence[ModelEntry], lines: Sequence[Input], base: Input | None, where: Where
) -> tuple[list[Input], list[Problem]]:
    """The lines with their alignments or requests for one."""
    fixed = {line.label: line.ref for line, entry in zip(lines, models, strict=True) if entry.align is None}
    if base is not None:
        fixed[base.label] = base.ref
    aligned: list[Input] = []
    problems: list[Problem] = []
    for line, entry in zip(lines, models, strict=True):
        align, wrong = _read_align(entry, f"{line.place}.align", base if line == base else None, fixed, where)
        aligned.append(replace(line, align=align))
        problems += wrong
    return aligned, problems


def _read_align(
    entry: ModelEntry, place: str, base: Input | None, fixed: Mapping[str, str], where: Where
) -> tuple[NamedFile | AlignRequest | None, list[Problem]]:
    """The alignment of a line. base: the base, if the line is it. fixed: as `read_align_request` takes them."""
    if entry.align is None:
        return None, []
    if base is not None:
        return None, [Problem(place, f"{base.ref} is the base; align the other models to it")]
    if entry.stats is not None:
        text = (
            "the statistics describe the model before `align` rewrites it. Save the rewritten model "
            "with `mergekit-lfm align --save`, collect its statistics, and merge that"
        )
        return None, [Problem(place, text)]
    if isinstance(entry.align, str):
        return read_file(entry.align, where, place, "a transform file")
    return read_align_request(entry.align, fixed, where, place)


def _name_model(named: Input, base: Input | None, before: Sequence[Input], *, apart: bool) -> Input:
    """The model of a new line: the base if this is its first line, else a model with its own label.

    apart: True for a changed model, which is never the base.
    """
    same = base is not None and (named.source, _applied(named)) == (base.source, _applied(base))
    if base is not None and same and base not in before and not apart:
        return base
    ref = named.ref
    labels = {model.label for model in before} | ({base.label} if base else set())
    copies = (f"{ref} ({n})" for n in range(2, len(before) + 3))
    return replace(named, label=next(label for label in (ref, *copies) if label not in labels))


def _applied(model: Input) -> list[tuple[Path | Elsewhere, float]]:
    """The adapters of a model and their scales, in the order in which they are applied."""
    return [(adapter.source, adapter.scale) for adapter in model.adapters]


def _choose_inputs(
    method: Method, base: Input | None, lines: Sequence[Input], *, whole: bool
) -> tuple[tuple[Input, ...], tuple[str, ...]]:
    """The method's inputs among the lines and the base, and a notice of parameters that a base does not have.

    whole: True for the models of a recipe without slices and modules, among which the base always is.
    """
    others = tuple(line for line in lines if line != base)
    if base is None:
        return others, ()
    listed = next((line for line in lines if line == base), base)
    if method.base == "member":
        return tuple(lines) if base in lines or not whole else (*lines, base), ()
    if method.base == "first":
        return (listed, *others), ()
    names = ", ".join(f"`{name}`" for name in listed.settings)
    place = f"{listed.place}.parameters: {names}"
    text = f"{place} has no effect here: {listed.ref} is the base, which {method.name} subtracts from the others"
    return others, (text,) if names else ()
