"""The config of a model that is stacked from the layers of others, and the facts of one layer in a config.

Every layer of the new model keeps the facts that it has where it comes from. Lists are put together anew, thresholds
get another value, and a number that no longer says what the layers are is left out beside a list that does. Then the
new config is read like the others: an entry after which a layer would differ from its source is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from typing import Any, NamedTuple

from mergekit_lfm.arch.layer_facts import Fact, Path, Stack, entry_of, facts_of, model_of, part_at, stacks_of
from mergekit_lfm.arch.layer_rules import Rule, rules_of
from mergekit_lfm.errors import PlanError, several, shorten

Config = Mapping[str, Any]
Origins = Sequence[tuple[Config, int]]

_ABSENT = "no entry"
# The numbers of layers whose outputs something else takes.
_TAPS = ("out_indices", "out_features", "deepstack_visual_indexes", "backbone_out_indices", "extract_layers")


def kinds_of(config: Config, layer: int) -> dict[str, Any]:
    """Return each fact of one layer by the name of its entry in the config: layers that differ here do not merge.

    Raises PlanError if the config describes no layer of this number.
    """
    stacks = stacks_of(config)
    kinds: dict[str, Any] = {}
    for path, _, count in stacks:
        if 0 <= layer < count:
            facts = facts_of(part_at(config, path) or {}, model_of(config, path), count)
            kinds |= {
                _join(path, name): fact.values[layer] for name, fact in facts.items() if len(fact.values) == count
            }
    if all(not 0 <= layer < stack.size for stack in stacks):
        raise PlanError(_no_layer(layer, max((stack.size for stack in stacks), default=0)))
    return kinds


def stack_config(config: Config, origins: Origins, count: int, prefix: str = "") -> dict[str, Any]:
    """The config of a model whose layer i is layer origins[i][1] of a model with the config origins[i][0].

    config: the template's, whose model has `count` layers; all but what it says of layers stays as it is. prefix: what
    the names of the layers' tensors begin with, which tells an encoder's from a decoder's, and those of images or sound
    from those of text; without one, an encoder and a decoder of `count` layers are both stacked.
    Raises PlanError with all entries that cannot be reconciled.
    """
    stacks = stacks_of(config, count, prefix)
    if not stacks:
        stated = [f"{_join(path, key)}: {size}" for path, keys, size in stacks_of(config, None, prefix) for key in keys]
        raise PlanError(
            f"the template's config states no number of layers that is {count}, as its tensors have: it has "
            f"{shorten(stated) or 'none'}. Correct its config.json, or take another model as the base"
        )
    result = deepcopy(dict(config))
    problems = [line for stack in stacks for line in _restack(result, stack, origins)]
    if problems:
        raise PlanError(several("the configs of the stacked layers cannot be reconciled", problems))
    return result


class _Source(NamedTuple):
    """The part of a config about the layers of the stack, how many it has, and what it says of them."""

    part: Config
    size: int
    facts: dict[str, Fact]


def _restack(result: dict[str, Any], stack: Stack, origins: Origins) -> list[str]:
    """Rewrite one part of the template's config, in place; return what cannot be reconciled in it."""
    path, keys, count = stack
    part, model = part_at(result, path), model_of(result, path)
    assert isinstance(part, dict)
    rules, before = rules_of(part, model), deepcopy(part)
    template = _Source(before, count, facts_of(before, model, count))
    sources = {id(source): _source(source, stack, rules) for source, _ in origins}
    layers = [(sources[id(source)], layer) for source, layer in origins]
    if outside := [_no_layer(layer, source.size) for source, layer in layers if not 0 <= layer < source.size]:
        return list(dict.fromkeys(outside))
    every = [template, *sources.values()]
    facts = {name: fact for source in reversed(every) for name, fact in source.facts.items()}
    facts = {name: fact for name, fact in facts.items() if not _is_same_list(name, every)}
    if wrong := [_join(path, line) for source in every for line in _wrong_lengths(source, facts)]:
        return list(dict.fromkeys(wrong))

    wanted = {name: [_value(name, fact, source, layer) for source, layer in layers] for name, fact in facts.items()}
    part.update(dict.fromkeys(keys, len(layers)))
    _rewrite(part, rules, facts, wanted)
    problems = _taps(part, count)
    stacked = _Source(part, len(layers), facts_of(part, model, len(layers)))
    for name, values in wanted.items():
        got = [_value(name, facts[name], stacked, layer) for layer in range(len(layers))]
        label = _label(name, before, next((rule for rule in rules if rule.fact == name), None))
        if _ABSENT in values:
            problems.append(_partial(label, values))
        elif got != values:
            problems.append(_difference(label, got, values, [layer for _, layer in layers]))
        elif facts[name].form == "pointers":
            problems += _misled(name, values, layers)
    return [_join(path, line) for line in problems]


def _rewrite(
    part: dict[str, Any], rules: Sequence[Rule], facts: Mapping[str, Fact], wanted: Mapping[str, list[Any]]
) -> None:
    """Make the entries of a config say of its layers what is wanted, as far as they can."""
    for name, values in wanted.items():
        if facts[name].form not in ("rule", "fixed", "window") and _ABSENT not in values:
            _write(part, name, entry_of(facts[name], name, values), values)
    listed = {name for name, fact in facts.items() if fact.form != "rule"}
    needed = {key for rule in rules for key in rule.keys if rule.fact not in listed}
    for rule in sorted(rules, key=lambda rule: rule.fact in listed):
        if _ABSENT not in wanted[rule.fact]:
            _settle(rule, part, wanted[rule.fact], needed if rule.fact in listed else set())


def _source(config: Config, stack: Stack, rules: Sequence[Rule]) -> _Source:
    """The layers of a config where the template has them, or else where the config has its own."""
    part = part_at(config, stack.path) or {}
    sizes = [part[key] for key in stack.keys if isinstance(part.get(key), int)]
    own = [Stack(stack.path, stack.keys, sizes[0])] if sizes else stacks_of(config)
    if not own:
        raise PlanError(
            f"a config of the stacked models states no number of layers, expected {' or '.join(stack.keys) or 'one'}; "
            "correct its config.json"
        )
    path, _, size = own[0]
    part = part_at(config, path) or {}
    implied = {rule.fact: Fact(rule.values(part, size), "rule") for rule in rules}
    return _Source(part, size, implied | facts_of(part, model_of(config, path), size))


def _entry(part: Config, name: str) -> Any:
    """The entry of a dotted name; None without one."""
    *path, key = name.split(".")
    inner = part_at(part, tuple(path))
    return None if inner is None else inner.get(key)


def _is_same_list(name: str, every: Sequence[_Source]) -> bool:
    """Whether models of different depths have one and the same list, which is then none of layers."""
    entries = [_entry(source.part, name) for source in every]
    same = all(isinstance(entry, list) and entry == entries[0] for entry in entries)
    return same and len({source.size for source in every}) > 1


def _wrong_lengths(source: _Source, facts: Mapping[str, Fact]) -> list[str]:
    """Lists of a config that other lists show to be of layers, but which have another number of entries."""
    both = [*facts.items(), *((name, fact) for name, fact in source.facts.items() if name in facts)]
    entries = {name: _entry(source.part, name) for name, fact in both if fact.form in ("list", "pointers")}
    return [
        f"{name} has {len(entry)} entries, expected one for each of {source.size} layers; correct the config.json"
        for name, entry in entries.items()
        if isinstance(entry, list) and len(entry) not in (0, source.size)
    ]


def _value(name: str, fact: Fact, source: _Source, layer: int) -> Any:
    """Return a fact of a source's layer. One number for all is that of each; tables and windows are of some layers."""
    if name in source.facts:
        return source.facts[name].values[layer]
    entry = _entry(source.part, name)
    if fact.form == "list" and entry is not None and not isinstance(entry, list | Mapping):
        return entry
    return None if fact.form in ("table", "window") else _ABSENT


def _write(part: dict[str, Any], name: str, entry: Any, values: Sequence[Any]) -> None:
    """Put the entry of a dotted name in place; one number for all layers stays if it is that of each."""
    *path, key = name.split(".")
    for step in path:
        part = part.setdefault(step, {})
    if isinstance(part.get(key), list | Mapping | None) or any(value != part[key] for value in values):
        part[key] = deepcopy(entry)


def _settle(rule: Rule, part: dict[str, Any], wanted: list[Any], needed: set[str]) -> None:
    """Change the entries of a rule so that it gives every layer the wanted value, or leave them out beside a list.

    needed: entries that stay as they are, since another rule without a list depends on them.
    """
    bare = {key: value for key, value in part.items() if key != rule.fact or key in rule.keys}
    free = [key for key in rule.thresholds if key not in needed]
    trials = product(range(len(wanted) + 1), repeat=len(free)) if free else ()
    for trial in [{}, *(dict(zip(free, numbers, strict=True)) for numbers in trials)]:
        if rule.values({**bare, **trial}, len(wanted)) == wanted:
            part.update(trial)
            return
    beside = part.get(rule.fact) is not None and rule.fact not in rule.keys
    changes = dict.fromkeys(rule.keys) if beside else {}
    if rule.rewrite is not None:
        changes = rule.rewrite(wanted)
    for key in changes.keys() - needed:
        if changes[key] is None:
            part.pop(key, None)
            part.pop(f"_{key}", None)  # a copy that transformers saves
        else:
            part[key] = changes[key]


def _taps(part: dict[str, Any], count: int) -> list[str]:
    """Entries that name layers by number for what reads their outputs: only the last layer is found in any stack."""
    if part.get("out_indices", [count]) == [count] and part.get("out_features", [f"stage{count}"]) == [f"stage{count}"]:
        for key in ("out_indices", "out_features", "stage_names"):
            part.pop(key, None)
    taken = {key: part[key] for key in _TAPS if part.get(key)}
    return [
        f"{key}: {value} names layers whose numbers change; take it out of the config" for key, value in taken.items()
    ]


def _misled(name: str, offsets: Sequence[Any], layers: Sequence[tuple[_Source, int]]) -> list[str]:
    """Layers that share with another one, which is not where it was before them."""
    moved = []
    for place, ((source, layer), offset) in enumerate(zip(layers, offsets, strict=True)):
        target = place + offset
        if not (0 <= target < len(layers) and layers[target][0] is source and layers[target][1] == layer + offset):
            moved.append(f"layer {place} shares with layer {layer + offset} of its model")
    return (
        [f"{name}: {shorten(moved, 4)}, which is not as far before it in the stack; stack them together"]
        if moved
        else []
    )


def _label(name: str, part: Config, rule: Rule | None) -> str:
    """The entries of a config that state a fact, with their values."""
    entries = {name: _entry(part, name)} if rule is None or name in part else {key: part.get(key) for key in rule.keys}
    return ", ".join(f"{key}: {value}" for key, value in entries.items() if value is not None) or name


def _partial(label: str, values: Sequence[Any]) -> str:
    """One line about an entry that only some configs have."""
    without = [str(place) for place, value in enumerate(values) if value == _ABSENT]
    return (
        f"{label} has no counterpart in the configs of layers {shorten(without)} of the stack; expected it in all or "
        "in none. Take models whose configs agree in this"
    )


def _difference(label: str, got: Sequence[Any], wanted: Sequence[Any], layers: Sequence[int]) -> str:
    """One line about the layers that would not be what they were."""
    wrong = [
        f"layer {place} would have {has!r}, but layer {layer}, which it is, has {needs!r}"
        for place, (has, needs, layer) in enumerate(zip(got, wanted, layers, strict=True))
        if has != needs
    ]
    return f"{label} does not fit the stack: {shorten(wrong, 4)}. Choose layers for which it holds"


def _no_layer(layer: int, count: int) -> str:
    return f"there is no layer {layer} in a model of {count} layers; the last one is {count - 1}"


def _join(path: Path, name: str) -> str:
    return ".".join([*path, name])
