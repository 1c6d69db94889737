"""The kinds of adapters: each finds the changes that its tensors for a module make to the tensors of the model.

To add a kind: its change, a function that finds it, and its line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from mergekit_lfm.artifacts.adapter import Adapter, Module
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.adapters.change import Added, Change, Multiplied, Rows
from mergekit_lfm.views.adapters.finding import Finding
from mergekit_lfm.views.adapters.lora import LowRank, Magnitude, Vera
from mergekit_lfm.views.adapters.names import is_conv1d
from mergekit_lfm.views.adapters.products import Factor, Hadamard, Kronecker


def halves_of(module: Module) -> tuple[str, str]:
    """The names of a module's two matrices."""
    return ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in module.parts else ("lora_A", "lora_B")


def find_halves(finding: Finding, module: Module) -> tuple[TensorSpec, TensorSpec] | None:
    """A module's A and B; None for one of trained tokens alone, and with a problem if one of them is not whole."""
    names = halves_of(module)
    if missing := [name for name in names if name not in module.parts]:
        if module.parts.keys() != {"trainable_tokens_delta"}:
            finding.refuse(module, f"it has no {missing[0]}; save the adapter anew")
        return None
    if "lora_embedding_A" in module.parts and {"lora_A", "lora_B"} & module.parts.keys():
        finding.refuse(module, "it has matrices of a layer and of an embedding; save the adapter anew")
        return None
    a, b = (module.parts[name] for name in names)
    if 0 in (*a.shape, *b.shape) or min(len(a.shape), len(b.shape)) < 2:
        text = f"its {names[0]} is {list(a.shape)}, {names[1]} {list(b.shape)}: the training saved one part of many; "
        finding.refuse(module, text + "save it gathered, with ZeRO-3 in GatheredParameters")
        return None
    return a, b


def _low_rank(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """The changes of LoRA, rsLoRA and DoRA: of a layer and its bias, a convolution, an embedding."""
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
    inputs = norms is not None and _scales_inputs_of(norms, out)
    count = a.shape[1] if inputs else out
    if norms is not None and norms.numel != count:
        finding.refuse(module, f"its lora_magnitude_vector is {list(norms.shape)}, expected {count} numbers")
    yield weight.name, change if norms is None else Magnitude(change, norms, turned != inputs)
    yield from _added_bias(finding, module, scale)


def _scales_inputs_of(norms: TensorSpec, out: int) -> bool:
    """Whether the norms of a DoRA are those of inputs: LyCORIS' are, [1, in, ...], unless asked for [out, 1, ...]."""
    return norms.name.endswith(".dora_scale") and norms.shape[:1] != (out,)


def _added_bias(finding: Finding, module: Module, scale: float) -> Iterator[tuple[str, Change]]:
    """The change of a layer's bias by the bias of a LoRA's B."""
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
    """The changes of IA3: of a layer and, where it scales outputs, of the layer's bias."""
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
    """The change of LoHa to a layer or a convolution."""
    one, other = _factor(module, "hada_w1", "hada_t1"), _factor(module, "hada_w2", "hada_t2")
    weight = finding.weight(module)
    stored = weight.shape[0], weight.numel // max(1, weight.shape[0])
    if one is None or other is None or {(f.height, f.width) for f in (one, other)} != {stored}:
        finding.refuse(module, f"its tensors, {_shapes(module)}, do not fit {weight}")
        return
    rank = finding.rank(module, module.name, module.parts["hada_w1_b"].shape[0])
    yield weight.name, Hadamard(one, other, finding.scale(module, module.name, rank))


def _kronecker(finding: Finding, module: Module) -> Iterator[tuple[str, Change]]:
    """The change of LoKr to a layer or a convolution."""
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
        rank = finding.adapter.rank_patterns.value(module.name, config.get("r"))
    scale = finding.scale(module, module.name, rank) if halves or config else 1.0
    yield weight.name, Kronecker(one, other, scale)


def _factor(module: Module, name: str, core: str) -> Factor | None:
    """A factor of a product from the module's tensors; None if one of them is missing or does not fit the others."""
    parts = module.parts
    if any(0 in spec.shape for spec in parts.values()):
        return None
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
    """The change of VeRA to a layer, with the matrices that all layers share."""
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
        finding.refuse(
            module, f"{_shapes(module)} with vera_A {list(a.shape)}, vera_B {list(b.shape)}: not of {weight}"
        )
        return
    yield weight.name, Vera(a, b, ranks, rows, out, columns, turned)


# How the names of the parts of each kind begin.
PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "LORA": ("lora_", "trainable_tokens_delta", "alpha"),
        "LOHA": ("hada_", "alpha"),
        "LOKR": ("lokr_", "alpha"),
        "IA3": ("ia3_",),
        "VERA": ("vera_",),
        "LN_TUNING": (),
        "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
    }
)

# By PEFT's name of the kind.
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
