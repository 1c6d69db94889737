"""Assign a recipe's models their roles in its method, and check their settings.

Every problem becomes one line in a list, with its place in the recipe, so that a user sees all of them at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lfm.artifacts.facts import read_facts_file
from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.methods import REQUIRED, Method
from mergekit_lfm.recipe.align import AlignRequest, align_options
from mergekit_lfm.recipe.edit import EditRequest, edit_options
from mergekit_lfm.recipe.rename import RenameRule, read_rename
from mergekit_lfm.recipe.values import NamedFile, Setting, read_setting
from mergekit_lfm.store.hub import HubName, hub_name

# Parameters of mergekit that change its memory use but never a result.
_WITHOUT_EFFECT = frozenset({"int8_mask"})


Edit = NamedFile | EditRequest


@dataclass(frozen=True, slots=True)
class Input:
    """A model of a recipe: `ref` as written, its `source`, and a `label` unique in the recipe.

    source: the absolute path of its folder, or its name on the Hub. rename: new names for its tensors, which all else
    sees. align: the transform file that rewrites it before the merge, or the request to find one. edits: patch files
    that change it before the merge, or requests to make one.
    """

    ref: str
    source: Path | HubName
    label: str
    align: NamedFile | AlignRequest | None = None
    edits: tuple[Edit, ...] = ()
    rename: tuple[RenameRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A model with its own settings and statistics, and its place in the recipe for messages."""

    model: Input
    settings: dict[str, Setting]
    place: str
    stats: NamedFile | None = None


@dataclass(frozen=True, slots=True)
class ModelLine:
    """A model as a recipe has it: its reference, parameters, statistics file, alignment, edits, and new names."""

    ref: str
    parameters: Mapping[str, Any]
    stats: str | None = None
    align: str | Mapping[str, Any] | None = None
    edits: Sequence[str | Mapping[str, Any]] = ()
    rename: object = None


@dataclass(frozen=True, slots=True)
class Roles:
    """A recipe's models as written (`entries`) and by role in the method, and the top level's settings.

    edits: of the result.
    """

    base: Input | None
    entries: tuple[Entry, ...]
    inputs: tuple[Entry, ...]
    settings: dict[str, Setting]
    edits: tuple[Edit, ...] = ()


def find_model(ref: str, where: Path | None) -> Path | HubName:
    """The absolute path of model `ref`, relative to `where`, else to the working directory, else its name on the Hub.

    Raises ValueError, naming both folders, for any other name. Does not ask the Hub.
    """
    hint = "expected a folder, or a model on the Hub as org/name or org/name@revision"
    if "+" in ref:
        hint = "adapters (model+lora) are not supported in this version; merge the adapter into its model first"
    try:
        return _find(ref, where, hint)
    except ValueError:
        name = hub_name(ref)
        if name is None:
            raise
        return name


def _find(ref: str, where: Path | None, hint: str) -> Path:
    folders = dict.fromkeys((where or Path.cwd(), Path.cwd()))
    try:
        relative = Path(ref).expanduser()
    except RuntimeError:
        raise ValueError(
            f"found {ref!r}, but no user has the home folder {ref.partition('/')[0]}; write the path in full"
        ) from None
    tried = list(dict.fromkeys((folder / relative).absolute() for folder in folders))
    for path in tried:
        if path.exists():
            return path.resolve()
    missing = " nor ".join(str(path) for path in tried)
    raise ValueError(f"found {ref!r}, but there is no {missing}; {hint}")


def read_settings(
    raw: Mapping[str, Any], method: Method, place: str, *, own: bool, problems: list[str]
) -> dict[str, Setting]:
    """The settings in a mapping `parameters`; `own` if it belongs to one model."""
    known = {parameter.name: parameter for parameter in method.parameters}
    settings = {}
    for name, value in raw.items():
        at = f"{place}.{name}"
        if name in _WITHOUT_EFFECT:
            continue
        if name not in known:
            problems.append(f"{at}: {method.name} has no such parameter, {did_you_mean(name, known)}")
            continue
        if own and not known[name].per_input:
            problems.append(f"{at}: {name} is shared by all inputs; move it to the top-level `parameters`")
        try:
            settings[name] = read_setting(value, known[name])
        except ValueError as wrong:
            problems.append(f"{at}{wrong}")
    return settings


def assign_roles(
    method: Method,
    models: Sequence[ModelLine],
    base_ref: str | None,
    parameters: Mapping[str, Any],
    edits: Sequence[str | Mapping[str, Any]],
    where: Path | None,
    problems: list[str],
) -> Roles:
    """The roles of `models` and of the base, and the result's edits."""
    base = None
    if base_ref is not None:
        base = Input(base_ref, _model_at(base_ref, where, "base_model", problems), base_ref)
    entries: list[Entry] = []
    for i, written in enumerate(models):
        place = f"models[{i}]"
        source = _model_at(written.ref, where, f"{place}.model", problems)
        settings = read_settings(written.parameters, method, f"{place}.parameters", own=True, problems=problems)
        stats = written.stats
        file = None if stats is None else _statistics_file(stats, method, where, f"{place}.stats", problems)
        model = _model(written.ref, source, base, entries, apart=bool(written.edits))
        renamed = replace(model, rename=_rename(written.rename, f"{place}.rename", problems))
        base = renamed if model == base else base
        model = replace(renamed, edits=_edits(written.edits, where, f"{place}.edits", problems))
        if model.edits and written.stats is not None:
            problems.append(
                f"{place}: the statistics describe the model before `edits` change it. Save the edited model with "
                "`mergekit-lfm patch apply`, collect its statistics, and merge that"
            )
        if model.edits and written.align is not None:
            problems.append(
                f"{place}: one merge cannot do both `edits` and `align` of a model. Save the edited model with "
                "`mergekit-lfm patch apply`, and align that"
            )
        entries.append(Entry(model, settings, place, file))
    entries = _align_entries(models, entries, base, where, problems)
    inputs = _inputs(method, base, entries, problems)
    shared = read_settings(parameters, method, "parameters", own=False, problems=problems)
    return Roles(base, tuple(entries), inputs, shared, _edits(edits, where, "edits", problems))


def _edits(
    written: Sequence[str | Mapping[str, Any]], where: Path | None, place: str, problems: list[str]
) -> tuple[Edit, ...]:
    """The patch files, and checked requests for edits still to be made."""
    edits: list[Edit] = []
    for i, raw in enumerate(written):
        at = f"{place}[{i}]"
        try:
            if isinstance(raw, str):
                edits.append(NamedFile(raw, _find(raw, where, "expected a patch file")))
            else:
                edits.append(_edit_request(raw, where, at))
        except ValueError as wrong:
            text = str(wrong)
            problems += (text if text.startswith(at) else f"{at}: {text}").split("\n")
    return tuple(edits)


def _rename(written: object, place: str, problems: list[str]) -> tuple[RenameRule, ...]:
    """The checked rules for a model's names."""
    try:
        return () if written is None else read_rename(written)
    except ValueError as wrong:
        problems += [f"{place}: {line}" for line in str(wrong).split("\n")]
        return ()


def _edit_request(given: Mapping[str, Any], where: Path | None, place: str) -> EditRequest:
    """The request in a mapping {facts, method, stats, ...}. Raises ValueError with its problems."""
    rest = dict(given)
    facts, method, stats = rest.pop("facts", None), rest.pop("method", "memit"), rest.pop("stats", None)
    if not isinstance(facts, str) or not isinstance(method, str) or not isinstance(stats, str | None):
        raise ValueError(f"found {dict(given)!r}, expected {{facts: FILE, method: NAME}}, and `stats` as a file's name")
    file = NamedFile(facts, _find(facts, where, "expected a facts file"))
    read_facts_file(file.path)
    edit_options(method, rest, place=place)
    gram = None
    if stats is not None:
        gram = NamedFile(stats, _find(stats, where, "expected a file made by `mergekit-lfm stats gram`"))
    return EditRequest(file, method, json.dumps(rest), gram)


def _align_entries(
    models: Sequence[ModelLine], entries: Sequence[Entry], base: Input | None, where: Path | None, problems: list[str]
) -> list[Entry]:
    """The entries with their alignments or requests for one."""
    fixed = {entry.model.label: entry.model for entry, w in zip(entries, models, strict=True) if w.align is None}
    if base is not None:
        fixed[base.label] = base
    aligned = []
    for entry, written in zip(entries, models, strict=True):
        place = f"{entry.place}.align"
        align: NamedFile | AlignRequest | None = None
        try:
            if written.align is not None and entry.model == base:
                raise ValueError(f"{place}: {base.ref} is the base; align the other models to it")
            if written.align is not None and written.stats is not None:
                raise ValueError(
                    f"{place}: the statistics describe the model before `align` rewrites it. Save the rewritten model "
                    "with `mergekit-lfm align --save`, collect its statistics, and merge that"
                )
            if isinstance(written.align, str):
                align = NamedFile(written.align, _find(written.align, where, "expected a transform file"))
            elif written.align is not None:
                align = _request(written.align, fixed, where, place)
        except ValueError as wrong:
            text = str(wrong)
            problems += (text if text.startswith(place) else f"{place}: {text}").split("\n")
        aligned.append(replace(entry, model=replace(entry.model, align=align)))
    return aligned


def _request(given: Mapping[str, Any], fixed: Mapping[str, Input], where: Path | None, place: str) -> AlignRequest:
    """The request in a mapping {to, method, ...}. Raises ValueError with its problems."""
    rest = dict(given)
    to, method, stats = rest.pop("to", None), rest.pop("method", "weight_matching"), rest.pop("stats", None)
    if not isinstance(to, str) or not isinstance(method, str) or not isinstance(stats, str | None):
        raise ValueError(f"found {dict(given)!r}, expected {{to: MODEL, method: NAME}}, and `stats` as a file's name")
    label = next((label for label, model in fixed.items() if to in (label, model.ref)), None)
    if label is None:
        raise ValueError(
            f"{place}.to: found {to!r}, expected a model of this recipe that is not aligned itself; "
            f"{did_you_mean(to, fixed)}"
        )
    options = align_options(method, rest, statistics=stats is not None, place=place)
    if stats is None:
        return AlignRequest(label, method, tuple(options.items()))
    try:
        file = NamedFile(stats, _find(stats, where, "expected a file made by `mergekit-lfm stats cross`"))
    except ValueError as wrong:
        raise ValueError(f"{place}.stats: {wrong}") from None
    return AlignRequest(label, method, tuple(options.items()), file)


def _statistics_file(ref: str, method: Method, where: Path | None, place: str, problems: list[str]) -> NamedFile | None:
    if method.statistics is None:
        problems.append(f"{place}: {method.name} takes no statistics; remove the key, or choose a method that does")
        return None
    try:
        return NamedFile(ref, _find(ref, where, "expected a file made by `mergekit-lfm stats`"))
    except ValueError as wrong:
        problems.append(f"{place}: {wrong}")
        return None


def _model_at(ref: str, where: Path | None, place: str, problems: list[str]) -> Path | HubName:
    try:
        return find_model(ref, where)
    except ValueError as wrong:
        problems.append(f"{place}: {wrong}")
        return Path(ref)


def _model(
    ref: str, source: Path | HubName, base: Input | None, before: Sequence[Entry], *, apart: bool = False
) -> Input:
    """The model of a new entry: the base if this is its first entry, else a model with its own label.

    apart: True for a changed model, which is never the base.
    """
    taken = {entry.model for entry in before}
    if base is not None and source == base.source and base not in taken and not apart:
        return base
    labels = {model.label for model in taken} | ({base.label} if base else set())
    copies = (f"{ref} ({n})" for n in range(2, len(before) + 3))
    return Input(ref, source, next(label for label in (ref, *copies) if label not in labels))


def _inputs(method: Method, base: Input | None, entries: Sequence[Entry], problems: list[str]) -> tuple[Entry, ...]:
    others = tuple(entry for entry in entries if entry.model != base)
    if base is None:
        return others
    listed = next((entry for entry in entries if entry.model == base), Entry(base, {}, "base_model"))
    if method.base == "member":
        return tuple(entries) if listed in entries else (*entries, listed)
    if method.base == "first":
        return (listed, *others)
    if listed.settings:
        problems.append(
            f"{listed.place}.parameters: {listed.model.ref} is the base, which {method.name} subtracts from the others "
            "and takes no parameters for; remove them"
        )
    return others


def missing_requirements(method: Method, roles: Roles) -> list[str]:
    """One line for everything that the method needs and the recipe lacks."""
    lines = []
    if roles.base is None and method.base in ("required", "first"):
        lines.append(f"base_model: required by {method.name}; name the model that the others were made from")
    least, most = method.inputs
    count = len(roles.inputs)
    if not lines and not (least <= count and (most is None or count <= most)):
        wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        role = {"member": "", "first": ", the base included"}.get(method.base, ", not counting the base")
        labels = ", ".join(entry.model.label for entry in roles.inputs) or "none"
        noun = "model" if wanted.endswith(" 1") else "models"
        lines.append(f"models: {method.name} takes {wanted} {noun}{role}; found {count}: {labels}")
    return lines + _unset(method, roles) + _without_statistics(method, roles)


def _unset(method: Method, roles: Roles) -> list[str]:
    """One line for every parameter without a default that the recipe sets nowhere."""
    lines = []
    for parameter in method.parameters:
        if parameter.default is not REQUIRED or parameter.name in roles.settings:
            continue
        if not parameter.per_input:
            lines.append(f"parameters.{parameter.name}: required by {method.name}")
            continue
        for entry in (entry for entry in roles.inputs if parameter.name not in entry.settings):
            role = ", for which the base is an input like the others" if entry.place == "base_model" else ""
            advice = "list the base under models with one" if role else "or give one in the top-level `parameters`"
            name = f"{entry.place}.parameters.{parameter.name}" if not role else "base_model"
            lines.append(
                f"{name}: {entry.model.label} has no {parameter.name}, required by {method.name}{role}; {advice}"
            )
    return lines


def _without_statistics(method: Method, roles: Roles) -> list[str]:
    """One line for every input that lacks the statistics that the method needs."""
    if method.statistics is None:
        return []
    lines = []
    for entry in (entry for entry in roles.inputs if entry.stats is None):
        label = entry.model.label
        place = entry.place if entry.place == "base_model" else f"{entry.place}.stats"
        role = "; the base is an input like the others: list it under models" if entry.place == "base_model" else ""
        lines.append(
            f"{place}: {method.name} needs the {method.statistics} statistics of {label}{role}; collect them with "
            f"`mergekit-lfm stats {method.statistics} {label} --data FILE ...` and name the file as the model's `stats`"
        )
    return lines
