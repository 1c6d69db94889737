"""Find the changes that an adapter makes to a model: its tensors by name, and the changes of each. Headers suffice.

All that does not fit is collected, and refused in one message: halves that are missing, ranks other than the config
says, tensors that the model lacks or has in another shape, and keys of the config that nothing here stands for.
"""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lfm.arch.ties import tied_names
from mergekit_lfm.artifacts.adapter import Adapter, Module
from mergekit_lfm.artifacts.prompt import PREFIX, SOFT
from mergekit_lfm.errors import PlanError, several, shorten
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import FLOATS
from mergekit_lfm.views.adapters.change import Change, Replaced
from mergekit_lfm.views.adapters.experts import expert_changes
from mergekit_lfm.views.adapters.finding import Finding
from mergekit_lfm.views.adapters.kinds import KINDS, PARTS
from mergekit_lfm.views.adapters.names import find_names

Changes = dict[str, list[Change]]  # by the model's name of a tensor, in the order in which they are made

# The ways to start an adapter that change the weights of the model that it is trained with.
REBASED = ("pissa", "olora", "corda", "lora_ga", "loftq")
UNCHANGED = ("MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE")


def find_changes(adapter: Adapter, model: Checkpoint, label: object) -> Changes:
    """The changes of the tensors of a model. label: of it. Raises PlanError with all that does not fit."""
    refuse_kind(adapter)
    names = find_names(adapter, model)
    finding = Finding(adapter, model, str(model.config.get("model_type", "")), names)
    finding.problems += [*strange_keys(adapter), *all_strange_parts(adapter)]
    changes: Changes = {}
    for name, change in _all_changes(finding):
        dtypes = {model[name].dtype, *(part.dtype for part in change.parts)}
        if not dtypes <= {*FLOATS} and not (isinstance(change, Replaced) and len(dtypes) == 1):  # a counter, say
            others = ", ".join(str(part) for part in change.parts)
            finding.problems.append(f"{model[name]} cannot be changed by {others}: give the model it was trained on")
        changes.setdefault(name, []).append(change)
    both: dict[str, list[str]] = {}
    for name, own in names.items():
        both.setdefault(own, []).append(name)
    if twice := [" and ".join(each) for own, each in both.items() if len(each) > 1 and own in model]:
        finding.problems.append(f"it changes one tensor by two names: {shorten(twice, 3)}; save each model's by itself")
    lacking = [name for name, own in names.items() if own not in model]
    if lacking:
        finding.problems.append(_describe_lack(finding, lacking, label))
    if finding.problems:
        raise PlanError(several(f"{adapter.label} does not fit {label}", finding.problems, most=10))
    return changes


def refuse_kind(adapter: Adapter) -> None:
    """Raise PlanError for an adapter that changes no weights, is of an unknown kind, or needs other weights."""
    if adapter.kind in (PREFIX, *SOFT):
        raise PlanError(
            f"{adapter.label} is {adapter.kind}, a prompt, which changes no weights: it cannot be merged; run "
            f"its model with it, as `mergekit-lfm eval MODEL --prompt {adapter.label}` does"
        )
    if adapter.kind in UNCHANGED:
        raise PlanError(f"{adapter.label} is {adapter.kind}, which changes no weights: it cannot be merged")
    if adapter.kind not in KINDS:
        raise PlanError(
            f"{adapter.label} is {adapter.kind}, expected one of {', '.join(KINDS)}: merge it into its model with "
            "peft's merge_and_unload"
        )
    made = adapter.config.get("init_lora_weights")
    if isinstance(made, str) and made.startswith(REBASED):
        raise PlanError(
            f"{adapter.label} was started with {made!r}, which changes the model's weights, too: save it again with "
            "path_initial_model_for_weight_conversion, or set init_lora_weights to true if MODEL is the changed one"
        )


def _all_changes(finding: Finding) -> Iterator[tuple[str, Change]]:
    """The changes, by tensor: the saved ones first, since a low-rank change is on top of the weight beside it."""
    adapter, model, names = finding.adapter, finding.model, finding.names
    for name, spec in adapter.saved.items():
        old = model.get(names.get(name, ""))
        if old is not None and old.shape != spec.shape:
            finding.problems.append(f"{old} is {list(spec.shape)} in the adapter: give the model it was trained on")
        elif old is not None:
            yield old.name, Replaced(spec)
    for module in adapter.modules:
        if names.get(f"{module.name}.weight") in model and not strange_parts(adapter, module):
            yield from KINDS[adapter.kind_of(module)](finding, module)
    yield from expert_changes(finding)


def all_strange_parts(adapter: Adapter) -> Iterator[str]:
    """A problem for each module with tensors that would have no effect."""
    for module in adapter.modules:
        kind = adapter.kind_of(module)
        if strange := strange_parts(adapter, module):
            yield f"{module.name}: it has {', '.join(strange)}, which is not of {kind}; merge it with what trained it"
        elif not module.name and kind != "VERA":
            yield f"its {', '.join(module.parts)} are of no module; save the adapter anew"


def strange_parts(adapter: Adapter, module: Module) -> list[str]:
    """The tensors of a module that its kind has no use for."""
    return [part for part in module.parts if not part.startswith(PARTS[adapter.kind_of(module)])]


def strange_keys(adapter: Adapter) -> Iterator[str]:
    """The keys of the config that nothing here stands for, and patterns that match no module."""
    known = {"r", "alpha", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"}
    known |= {
        "init_lora_weights",
        "target_parameters",
        "feedforward_modules",
        "token_indices",
        "trainable_token_indices",
    }
    for name, value in adapter.key.items():
        if name not in known:
            yield f"adapter_config.json has {name}: {value!r:.60}, which is not supported here; merge it with peft"
    modules = [module.name for module in adapter.modules]
    modules += [f"{name}.{each.rpartition('.')[2]}" for name in modules for each in _parameters(adapter)]
    for key, patterns in (("rank_pattern", adapter.rank_patterns), ("alpha_pattern", adapter.alpha_patterns)):
        for pattern in patterns.idle(modules):
            yield f"{key} has {pattern!r}, which matches none of its modules; correct or remove it"


def _parameters(adapter: Adapter) -> list[str]:
    return list(adapter.config.get("target_parameters") or ())


def _describe_lack(finding: Finding, lacking: list[str], label: object) -> str:
    """A message about tensors that the adapter changes and the model lacks."""
    adapter, model = finding.adapter, finding.model
    trained = f"; it was trained on {adapter.base}" if adapter.base else ""
    tied = {name: group for group in tied_names(dict.fromkeys([*model, *lacking])) for name in group}
    for name in (name for name in lacking if name in tied):
        held = [other for other in tied[name] if other in model]
        if held:
            return (
                f"it changes {name}, which the model ties to {held[0]} and does not store: a merged model would need "
                "both; save the model with the two apart, and tie_word_embeddings false"
            )
    if len(lacking) == len(finding.names):
        return f"none of the {len(lacking)} tensors that it changes, such as {lacking[0]}, is in {label}{trained}"
    heads = [name for name in lacking if name in adapter.saved]
    if len(heads) == len(lacking):
        return (
            f"it holds {shorten(heads, 3)}, which the model lacks: give the model with the head that it was trained on"
        )
    return f"it changes {shorten(lacking, 3)}, which the model does not have{trained}"
