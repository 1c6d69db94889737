"""Find what an adapter changes in a model: its tensors by name, and the change of each. Headers suffice.

All that does not fit is collected, and refused in one message: halves that are missing, ranks other than the config
says, tensors that the model lacks or has in another shape, and keys of the config that nothing here stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mergekit_lfm.arch.ties import tied_names
from mergekit_lfm.artifacts.adapter import Adapter, Module, idle_patterns, pattern_value
from mergekit_lfm.errors import PlanError, several, shorten
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import FLOATS, TensorSpec
from mergekit_lfm.views.adapters.change import Added, Change, Multiplied, Replaced, Rows
from mergekit_lfm.views.adapters.experts import expert_changes
from mergekit_lfm.views.adapters.lora import LowRank, Magnitude, Vera
from mergekit_lfm.views.adapters.names import find_names, is_conv1d
from mergekit_lfm.views.adapters.products import Factor, Hadamard, Kronecker

Changes = dict[str, list[Change]]  # by the model's name of a tensor, in the order in which they are made

# What an adapter is trained against is no longer the model on the disk if it was made in these ways.
REBASED = ("pissa", "olora", "corda", "lora_ga", "loftq")
UNCHANGED = "PROMPT_TUNING P_TUNING PREFIX_TUNING MULTITASK_PROMPT_TUNING CPT ADAPTION_PROMPT CARTRIDGE".split()


@dataclass
class Finding:
    """An adapter, the model, and what is found of what the one does to the other.

    names: by the adapter's names of the model's tensors, the model's own. at: the module that is looked at.
    """

    adapter: Adapter
    model: Mapping[str, TensorSpec]
    model_type: str
    names: Mapping[str, str]
    problems: list[str] = field(default_factory=list)

    def refuse(self, module: Module, text: str) -> None:
        self.problems.append(f"{module.name}: {text}")

    def weight(self, module: Module) -> TensorSpec:
        return self.model[self.names[f"{module.name}.weight"]]

    def rank(self, module: Module, name: str, found: int) -> int:
        """The rank of a module, which its tensors and the config must agree on. name: for the config's patterns."""
        if not self.adapter.config:
            return found
        stated = self.stated_rank(name)
        if stated != found:
            self.refuse(module, f"its tensors have rank {found}, adapter_config.json says {stated}")
        return found

    def stated_rank(self, name: str) -> object:
        """The rank that the config has for a module or a tensor of this name."""
        config = self.adapter.config
        return pattern_value(config.get("rank_pattern") or {}, name, config.get("r"))

    def scale(self, module: Module, name: str, rank: int) -> float:
        """The factor of a module's change: alpha over the rank or, for rsLoRA, over the rank's root."""
        config = self.adapter.config
        if config:
            alpha = pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", config.get("alpha")))
        else:
            alpha = _number(self.adapter, module) if "alpha" in module.parts else rank
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            self.refuse(module, f"found {alpha!r} as its alpha, expected a number")
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def is_turned(self, module: Module, weight: TensorSpec, out: int, columns: int) -> bool | None:
        """Whether the model stores a weight as [in, out]; None if it has another shape."""
        stored = (weight.shape[0], weight.numel // max(1, weight.shape[0])) if weight.shape else ()
        if out == columns and stored == (out, out) and len(weight.shape) == 2:
            return is_conv1d(module.name, self.model_type, bool(self.adapter.config.get("fan_in_fan_out")))
        if stored == (out, columns):
            return False
        return True if len(weight.shape) == 2 and stored == (columns, out) else None


def _number(adapter: Adapter, module: Module) -> float:
    """The number in a module's tensor `alpha`."""
    return float(adapter.tensors.read(module.parts["alpha"].name)[0])


def find_changes(adapter: Adapter, model: Checkpoint, label: object) -> Changes:
    """What the adapter does to the tensors of the model. Raises PlanError with all that does not fit. label: of it."""
    refuse_kind(adapter)
    names = find_names(adapter, model)
    finding = Finding(adapter, model, str(model.config.get("model_type", "")), names)
    finding.problems += strange_keys(adapter)
    changes: Changes = {}
    for name, change in _all_changes(finding):
        if model[name].dtype not in FLOATS:
            finding.problems.append(f"{model[name]}, which no adapter can change")
        changes.setdefault(name, []).append(change)
    lacking = [name for name, own in names.items() if own not in model]
    if lacking:
        finding.problems.append(_describe_lack(finding, lacking, label))
    if finding.problems:
        raise PlanError(several(f"{adapter.label} does not fit {label}", finding.problems, most=10))
    return changes


def refuse_kind(adapter: Adapter) -> None:
    """Raise PlanError for an adapter that changes no weights, is of an unknown kind, or needs other weights."""
    if adapter.kind in UNCHANGED:
        raise PlanError(f"{adapter.label} is {adapter.kind}, which changes no weights of its model: it cannot be merged")
    if adapter.kind not in KINDS:
        raise PlanError(
            f"{adapter.label} is {adapter.kind}, expected one of {', '.join(KINDS)}: merge it into its model with peft's "
            "merge_and_unload"
        )
    made = adapter.config.get("init_lora_weights")
    if isinstance(made, str) and made.startswith(REBASED):
        raise PlanError(
            f"{adapter.label} was started with {made!r}, which changes the weights of the model, too: save it again with "
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
        if names.get(f"{module.name}.weight") in model:
            yield from KINDS[adapter.kind](finding, module)
    yield from expert_changes(finding)


def halves_of(module: Module) -> tuple[str, str]:
    """The names of a module's two matrices."""
    return ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in module.parts else ("lora_A", "lora_B")


def find_halves(finding: Finding, module: Module) -> tuple[TensorSpec, TensorSpec] | None:
    """A module's A and B; None, and a problem if only one of them is whole."""
    names = halves_of(module)
    if missing := [name for name in names if name not in module.parts]:
        if len(missing) < 2 or "lora_embedding_B" in module.parts:
            finding.refuse(module, f"it has no {missing[0]}; save the adapter anew")
        return None
    a, b = (module.parts[name] for name in names)
    if 0 in (*a.shape, *b.shape) or min(len(a.shape), len(b.shape)) < 2:
        text = f"its {names[0]} is {list(a.shape)}, {names[1]} {list(b.shape)}: the training saved one part of many; "
        finding.refuse(module, text + "save it gathered, with ZeRO-3 in GatheredParameters")
        return None
    return a, b


def _low_rank(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """What LoRA, rsLoRA and DoRA do to a layer, a convolution or an embedding, and to the layer's bias."""
    if "trainable_tokens_delta" in module.parts:
        yield from _tokens(finding, module)
    halves = find_halves(finding, module)
    if halves is None:
        return
    a, b, names = *halves, halves_of(module)
    weight, rank = finding.weight(module), a.shape[0]
    out, columns = b.shape[0], a.numel // rank
    turned = finding.is_turned(module, weight, out, columns)
    if names[0] == "lora_embedding_A" and weight.shape == (columns, out):
        turned = True
    if turned is None or b.numel != out * rank:
        finding.refuse(module, f"{names[0]} {list(a.shape)} and {names[1]} {list(b.shape)} do not fit {weight}")
        return
    scale = finding.scale(module, module.name, finding.rank(module, module.name, rank))
    change = LowRank(a, b, scale, turned)
    norms = module.parts.get("lora_magnitude_vector")
    if norms is None and finding.adapter.config.get("use_dora"):
        finding.refuse(module, "it has no lora_magnitude_vector, though use_dora is set; save the adapter anew")
    if norms is not None and norms.numel != out:
        finding.refuse(module, f"its lora_magnitude_vector is {list(norms.shape)}, expected {out} numbers")
    yield weight.name, change if norms is None else Magnitude(change, norms, turned)
    yield from _added_bias(finding, module, scale)


def _added_bias(finding: Finding, module: Module, scale: float) -> Iterator[tuple[str, Change]]:
    """What the bias of a LoRA's B does to the bias of its layer."""
    added = module.parts.get("lora_B.bias")
    if added is None:
        return
    bias = finding.model.get(finding.weight(module).name.removesuffix("weight") + "bias")
    if bias is None or bias.shape != added.shape:
        finding.refuse(module, f"its lora_B has a bias {list(added.shape)}, the model has {bias or 'none'}")
        return
    yield bias.name, Added(added, scale)


def _tokens(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """The rows of the tokens that were trained."""
    config, new, weight = finding.adapter.config, module.parts["trainable_tokens_delta"], finding.weight(module)
    stated = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(stated, Mapping):
        stated = next((own for name, own in stated.items() if f".{module.name}".endswith(f".{name}")), None)
    indices = stated if isinstance(stated, list) and all(type(each) is int for each in stated) else None
    if indices is None or new.shape != (len(indices), *weight.shape[1:]):
        found = "no list" if indices is None else f"{len(indices)} indices"
        finding.refuse(module, f"its trained tokens are {list(new.shape)}, with {found} in the config, for {weight}")
    elif any(not 0 <= index < weight.shape[0] for index in indices):
        finding.refuse(module, f"it trains the token {max(indices)}, the model has {weight.shape[0]} rows")
    else:
        yield weight.name, Rows(new, tuple(indices))


def _ia3(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """What IA3 does to a layer, and to its bias where it scales outputs."""
    factors, weight = module.parts["ia3_l"], finding.weight(module)
    n, shape, inputs = factors.numel, weight.shape, _scales_inputs(finding.adapter, module)
    conv1d = is_conv1d(module.name, finding.model_type, bool(finding.adapter.config.get("fan_in_fan_out")))
    fits = [axis for axis in range(min(2, len(shape))) if shape[axis] == n]
    wanted = int(inputs) if len(shape) != 2 else int(inputs != conv1d)
    if not fits:
        finding.refuse(module, f"its ia3_l is {list(factors.shape)}, which fits no axis of {weight}")
        return
    axis = wanted if wanted in fits else fits[0]
    yield weight.name, Multiplied(factors, across=axis == 1)
    bias = finding.model.get(weight.name.removesuffix("weight") + "bias")
    if not inputs and bias is not None:
        yield bias.name, Multiplied(factors, across=False)


def _scales_inputs(adapter: Adapter, module: Module) -> bool:
    """Whether IA3 scales what comes into a layer: those of a feed-forward network."""
    factors = module.parts["ia3_l"]
    if len(factors.shape) == 2 and factors.shape.count(1) == 1:
        return factors.shape[0] == 1
    stated = adapter.config.get("feedforward_modules") or ()
    wanted = [stated] if isinstance(stated, str) else stated
    return any(f".{module.name}".endswith(f".{name}") for name in wanted)


def _hadamard(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """What LoHa does to a layer or a convolution."""
    one, other = _factor(module, "hada_w1", "hada_t1"), _factor(module, "hada_w2", "hada_t2")
    weight = finding.weight(module)
    stored = weight.shape[0], weight.numel // max(1, weight.shape[0])
    if one is None or other is None or not {(f.height, f.width) for f in (one, other)} == {stored}:
        finding.refuse(module, f"its tensors, {_shapes(module)}, do not fit {weight}")
        return
    rank = finding.rank(module, module.name, module.parts["hada_w1_b"].shape[0])
    yield weight.name, Hadamard(one, other, finding.scale(module, module.name, rank))


def _kronecker(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """What LoKr does to a layer or a convolution."""
    one, other = _factor(module, "lokr_w1", ""), _factor(module, "lokr_w2", "lokr_t2")
    weight = finding.weight(module)
    stored = weight.shape[0], weight.numel // max(1, weight.shape[0])
    if one is None or other is None or (one.height * other.height, one.width * other.width) != stored:
        finding.refuse(module, f"its tensors, {_shapes(module)}, do not fit {weight}")
        return
    halves = [module.parts[part] for part in ("lokr_w1_b", "lokr_w2_b") if part in module.parts]
    config = finding.adapter.config
    if halves:
        rank = finding.rank(module, module.name, halves[0].shape[0])
    elif config:  # without halves the tensors show no rank; the factor is as for that which the config states
        rank = pattern_value(config.get("rank_pattern") or {}, module.name, config.get("r"))
    scale = finding.scale(module, module.name, rank) if halves or config else 1.0
    yield weight.name, Kronecker(one, other, scale)


def _factor(module: Module, name: str, core: str) -> Factor | None:
    """A factor of a product from the module's tensors; None if one of them is missing or does not fit the others."""
    parts = module.parts
    if name in parts:
        return Factor((parts[name],)) if len(parts[name].shape) >= 2 else None
    if f"{name}_a" not in parts or f"{name}_b" not in parts:
        return None
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if min(len(a.shape), len(b.shape)) < 2:
        return None
    if core not in parts:
        return Factor((a, b)) if a.numel == a.shape[0] * b.shape[0] else None
    middle = parts[core]
    return Factor((middle, a, b)) if middle.shape[:2] == (a.shape[0], b.shape[0]) else None


def _shapes(module: Module) -> str:
    return ", ".join(f"{part} {list(spec.shape)}" for part, spec in module.parts.items())


def _vera(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """What VeRA does to a layer, with the matrices that all layers share."""
    shared = next((each.parts for each in finding.adapter.modules if not each.name), {})
    if not {"vera_A", "vera_B"} <= shared.keys():
        finding.refuse(module, "the matrices vera_A and vera_B are not in the file: save it with save_projection=True")
        return
    if not {"vera_lambda_b", "vera_lambda_d"} <= module.parts.keys():
        finding.refuse(module, f"it has {_shapes(module)}, expected vera_lambda_b and vera_lambda_d")
        return
    a, b, rows, ranks = shared["vera_A"], shared["vera_B"], module.parts["vera_lambda_b"], module.parts["vera_lambda_d"]
    weight, out = finding.weight(module), rows.numel
    columns = weight.numel // max(1, out)
    turned = finding.is_turned(module, weight, out, columns)
    rank = finding.rank(module, module.name, ranks.numel)
    if turned is None or a.shape[0] != rank or b.shape[1:] != (rank,) or a.shape[1] < columns or b.shape[0] < out:
        finding.refuse(module, f"{_shapes(module)} with vera_A {list(a.shape)}, vera_B {list(b.shape)}: not of {weight}")
        return
    yield weight.name, Vera(a, b, ranks, rows, out, columns, turned)


def strange_keys(adapter: Adapter) -> Iterator[str]:
    """What the config asks for that nothing here does, and patterns that are about no module."""
    known = {"r", "alpha", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"}
    known |= {"init_lora_weights", "feedforward_modules", "token_indices", "trainable_token_indices"}
    for name, value in adapter.key.items():
        if name not in known:
            yield f"adapter_config.json has {name}: {value!r:.60}, which is not supported here; merge it with peft"
    modules = [module.name for module in adapter.modules]
    modules += [f"{name}.{each.rpartition('.')[2]}" for name in modules for each in _parameters(adapter)]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in idle_patterns(adapter.config.get(key) or {}, modules):
            yield f"{key} has {pattern!r}, which matches none of its modules; correct or remove it"


def _parameters(adapter: Adapter) -> list[str]:
    return list(adapter.config.get("target_parameters") or ())


def _describe_lack(finding: Finding, lacking: list[str], label: object) -> str:
    """A message about tensors that the adapter changes and the model lacks."""
    adapter, model = finding.adapter, finding.model
    trained = f"; it was trained on {adapter.base}" if adapter.base else ""
    if len(lacking) == len(finding.names):
        return f"none of the {len(lacking)} tensors that it changes, such as {lacking[0]}, is in {label}{trained}"
    tied = {name: group for group in tied_names(dict.fromkeys([*model, *lacking])) for name in group}
    for name in (name for name in lacking if name in tied):
        held = [other for other in tied[name] if other in model]
        if held:
            return (
                f"it changes {name}, which the model ties to {held[0]} and does not store: a merged model would need "
                "both; save the model with the two apart, and tie_word_embeddings false"
            )
    heads = [name for name in lacking if name in adapter.saved]
    if len(heads) == len(lacking):
        return f"it holds {shorten(heads, 3)}, which the model lacks: give the model with the head that it was trained on"
    return f"it changes {shorten(lacking, 3)}, which the model does not have{trained}"


# By PEFT's name of the kind what it does to a module. To add a kind: its change, and its line here.
KINDS: Mapping[str, Callable[[Finding, Module], Iterator[tuple[str, Change]]]] = MappingProxyType(
    {
        "LORA": _low_rank,
        "LOHA": _hadamard,
        "LOKR": _kronecker,
        "IA3": _ia3,
        "VERA": _vera,
        "LN_TUNING": _low_rank,  # it saves whole tensors
        "TRAINABLE_TOKENS": _tokens,
    }
)
