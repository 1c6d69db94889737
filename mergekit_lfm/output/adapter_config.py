"""The config of an adapter that is written: which modules PEFT wraps, at which ranks, and which it saves whole.

PEFT selects modules by the ends of their names, so a name that says enough in one model selects too much in another.
Every choice here is checked against all modules of the model. Source: peft 0.21, tuners/tuners_utils.py,
check_target_module_exists and _inject_parameters; utils/other.py, _set_trainable and get_pattern_key.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from mergekit_lfm.errors import PlanError, shorten

# The tasks that PEFT has a class for, by the end of an architecture's name.
TASKS: Mapping[str, str] = MappingProxyType(
    {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
)
# The heads of classifiers. For their tasks PEFT takes those that the model has from the adapter, which so needs them.
HEADS = ("classifier", "score", "qa_outputs")
_NEED_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
NO_TARGETS = "dummy-target-modules"  # PEFT's text for an adapter without wrapped modules

Short = Callable[[str], str]


def modules_of(names: Iterable[str]) -> set[str]:
    """The modules of a model that have tensors of these names in them, at any depth."""
    return {name[:i] for name in names for i, char in enumerate(name) if char == "."}


def saved_with(wanted: Collection[str], modules: Collection[str]) -> set[str]:
    """These modules, and those that PEFT cannot but save with them: whose names end as the names of some do."""
    return _picked(wanted, modules, _any_ends)


def make_config(
    *,
    ranks: Mapping[str, int],
    parameters: Mapping[str, int],
    saved: Collection[str],
    bias: bool,
    names: Collection[str],
    complete: bool,
    task: str | None,
    base: str | None,
    fan_in_fan_out: bool,
    tied: bool,
) -> dict[str, Any]:
    """The content of adapter_config.json, all changes being at the scale 1.

    ranks: by module, of those that PEFT wraps; parameters: by tensor, of those that it wraps. saved: the modules that
    are whole in the adapter. names: those of all tensors of the model, or not complete. tied: True if the head
    has the embedding's weight. Raises PlanError if PEFT cannot select them.
    """
    modules = modules_of(names)
    # PEFT warns of patterns that are about parameters, though it follows them: so r is their rank if they have one.
    r = _most_frequent(parameters or ranks)
    patterns = _find_patterns({**ranks, **parameters}, r)
    return {
        "alpha_pattern": patterns,
        "base_model_name_or_path": base,
        "bias": "all" if bias else "none",
        **({"ensure_weight_tying": True} if tied else {}),
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": _find_saved(saved, modules, complete=complete) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": patterns,
        "target_modules": _find_targets(ranks, modules, complete=complete) or ([] if parameters else NO_TARGETS),
        "target_parameters": _find_parameters(parameters, names, complete=complete) or None,
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }


def find_task(architecture: str | None, saved: Collection[str], modules: Collection[str]) -> str | None:
    """PEFT's name of the model's task; None without one, and where PEFT would look for a head that is not saved."""
    task = next((task for end, task in TASKS.items() if (architecture or "").endswith(end)), None)
    heads = {module for module in modules if module.endswith(HEADS)}
    return None if task in _NEED_HEADS and not heads <= {*saved} else task


def _find_targets(wanted: Collection[str], modules: Collection[str], *, complete: bool) -> list[str] | str:
    """The value of `target_modules`: ends of names where they select exactly these, else names, else an expression."""
    if not complete:
        return sorted(wanted, key=in_order)
    keys = _exact_keys(wanted, modules, _ends, lambda name: name.rpartition(".")[2])
    return "|".join(re.escape(name) for name in sorted(wanted, key=in_order)) if keys is None else keys


def _find_parameters(wanted: Collection[str], names: Collection[str], *, complete: bool) -> list[str]:
    """The value of `target_parameters`."""
    keys = _exact_keys(wanted, names, _ends, (lambda name: re.split(r"\.\d+\.", name)[-1]) if complete else str)
    if keys is None:
        raise PlanError(f"PEFT cannot tell {shorten([*wanted], 3)} from other tensors of the model; exclude them")
    return keys


def _find_saved(wanted: Collection[str], modules: Collection[str], *, complete: bool) -> list[str]:
    """The value of `modules_to_save`."""
    keys = _exact_keys(wanted, modules, _any_ends, (lambda name: name.rpartition(".")[2]) if complete else str)
    if keys is None:
        others = sorted(saved_with(wanted, modules) - {*wanted}, key=in_order)
        raise PlanError(
            f"PEFT cannot save {shorten(sorted(wanted), 3)} without {shorten(others, 3)}, whose names end alike; "
            "exclude them, or save those, too"
        )
    return keys


def _exact_keys(
    wanted: Collection[str], known: Collection[str], ends: Callable[[str], Iterator[str]], short: Short
) -> list[str] | None:
    """Keys that select exactly the wanted names among the known: short ones if possible. None if no keys do."""
    groups: dict[str, list[str]] = {}
    for name in sorted(wanted, key=in_order):
        groups.setdefault(short(name), []).append(name)
    keys = list[str]()
    for key, own in groups.items():
        keys += [key] if _picked([key], known, ends) == {*own} else own
    return sorted(keys, key=in_order) if _picked(keys, known, ends) == {*wanted} else None


def _picked(keys: Collection[str], known: Collection[str], ends: Callable[[str], Iterator[str]]) -> set[str]:
    """The known names that one of the keys selects."""
    own = {*keys}
    return {name for name in known if any(end in own for end in ends(name))}


def _ends(name: str) -> Iterator[str]:
    """A name and what follows each of its dots."""
    yield name
    yield from (name[i + 1 :] for i, char in enumerate(name) if char == ".")


def _any_ends(name: str) -> Iterator[str]:
    """All ends of a name."""
    return (name[i:] for i in range(len(name)))


def _most_frequent(ranks: Mapping[str, int]) -> int:
    """The most frequent rank, of equals the least."""
    counts = Counter(ranks.values())
    return min(counts, key=lambda rank: (-counts[rank], rank), default=1)


def _find_patterns(ranks: Mapping[str, int], r: int) -> dict[str, int]:
    """The ranks other than r, by the ends of the names if all that end so have it, else by the names."""
    leaves: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        for end in _ends(name):
            leaves.setdefault(end, set()).add(rank)
    patterns = {}
    for name in sorted(ranks, key=in_order):
        leaf = name.rpartition(".")[2]
        if ranks[name] != r:
            whole = name if leaves[name] == {ranks[name]} else f"^{name}"
            patterns[leaf if leaves[leaf] == {ranks[name]} else whole] = ranks[name]
    return patterns


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names with their numbers as numbers."""
    return [(int(text), "") if text.isdecimal() else (-1, text) for text in name.split(".")]
