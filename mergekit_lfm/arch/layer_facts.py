"""The facts of every layer in a config: lists with an entry for each, lists of layers, letters, numbers with a rule.

A list has an entry for each layer if it has as many as there are layers, unless its name is that of something else
(_OTHER) or it stands in a part about something else (_APART). A list of numbers of layers is known by its name.
An entry of another name that seems to count layers stays, and has to mean the same of each: its form is `fixed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from mergekit_lfm.arch.layer_rules import FULL, Part, rules_of

Path = tuple[str, ...]
Form = Literal["list", "indices", "enumeration", "pointers", "letters", "table", "rule", "fixed", "window"]

_COUNT = re.compile(r"(num_|n_)?((en|de)coder_)?(num_)?(hidden_|transformer_)?(layers?|blocks)|depth")
# The parts of a config about something else than layers, or about the layers of another stack.
_APART = re.compile(
    r"rope|scaling|quant|compression|generation|vision|visual|image|video|audio|speech|talker|code2wav|token2wav|mtp|"
    r"id2label|label2id|task_specific_params|auto_map|projector|adapter|qformer|perceiver|backbone_config"
)
# Lists that may have as many entries as there are layers by accident.
_OTHER = re.compile(
    r"architectures|mrope_section|encode_proj_layers|mtp_.*|stage_.*|out_(features|indices)|time_step_limit|"
    r"(mlp|ssm|qkv)_multipliers|keys_to_ignore.*|.*tokens?|.*token_ids?|.*label.*|lang.*|image_.*|.*pinpoints|.*(mean|std|betas|quantiles)|"
    r".*(patch|kernel|stride|dilation|padding|tubelet|crop|pool|channel|ratio|bandwidth).*|(conv|tdnn)_.*"
)
# Lists with an entry for each layer, which a config has with another length only by mistake.
_KNOWN = re.compile(r"(mlp_)?layer_types|layers_block_type|no_rope_layers|indexer_types")
_INDICES = re.compile(
    r"(full_attn|attn_layer|attention_layer|sliding|global|local|moe)_(idxs?|indices|indexes)|"
    r"(cross_attention|moe|sliding|global|local|swa|full_attn|full_attention|kda|dense|mamba|linear|rope_scaling|subsample|"
    r"look_ahead|look_backward)(_attention|_attn)?_layers|(local|hybrid|ple|global|moe|dense)_layer_ids|moe_layers_enum|"
    r"(global_attn|fullatt_block|window_block|residual_block)_(indices|indexes)|global_attention_blocks"
)
_FROM_ONE = frozenset({"kda_layers", "full_attn_layers", "ple_layer_ids"})  # these count from 1
_POINTERS = frozenset({"kv_source_layers"})  # for each layer the number of another
_PERIOD = re.compile(
    r"\w*(layer|attn|attention|moe|expert|rope|block|sparse)\w*_(interval|period|frequency|freq|step|every_n_layers)"
)
# Numbers of layers, be they from 0 or from 1.
_SOME = re.compile(r"\w*(layers|layer_(ids?|idxs?|indices|indexes)|idxs)")
_BLOCKS = frozenset({"xlstm"})  # whose blocks are the layers; elsewhere they are something else beside these
_LAST_FULL = frozenset({"gemma4", "gemma4_unified", "diffusion_gemma", "embedding_gemma2"})  # whatever their lists say


@dataclass(frozen=True)
class Fact:
    """One fact of every layer, and the form in which the config states it."""

    values: Sequence[Any]
    form: Form


class Stack(NamedTuple):
    """A part of a config that says how many layers there are, with the entries that do; without one a list does."""

    path: Path
    keys: tuple[str, ...]
    size: int


def stacks_of(config: Part, size: int | None = None, prefix: str = "") -> list[Stack]:
    """The stacks of layers that a config describes, the outermost first.

    size: of these only those with this number of layers. prefix: what the names of the layers' tensors begin with: in
    the names of an encoder, a decoder or of something other than text, the entries are those of that; without one,
    those of images or sound come in only where there is no other.
    """
    stacks = list(_stacks(config, (), size))
    apart = bool(_APART.search(prefix))
    main = [stack for stack in stacks if any(_APART.search(key) for key in stack.path) == apart] or stacks
    sides = [stack._replace(keys=_keys_on_side(stack.keys, prefix)) for stack in main]
    return [stack for stack in sides if stack.keys] or main


def _keys_on_side(keys: tuple[str, ...], prefix: str) -> tuple[str, ...]:
    """The entries that count the layers of an encoder, or of a decoder, if the names are of one."""
    if "decoder." not in prefix and "encoder." not in prefix:
        return keys
    decoder = prefix.rfind("decoder.") > prefix.rfind("encoder.")
    return tuple(key for key in keys if ("decoder" in key) == decoder)


def _stacks(part: Part, path: Path, size: int | None) -> Iterator[Stack]:
    if not isinstance(part.get("depths"), list):  # stages of several layers each
        counts = {key: value for key, value in part.items() if _COUNT.fullmatch(key) and _is_number(value) and value}
        lists = [len(value) for key, value in part.items() if _KNOWN.fullmatch(key) and isinstance(value, list)]
        if part.get("model_type") not in _BLOCKS and any(not key.endswith("blocks") for key in counts):
            counts = {key: value for key, value in counts.items() if not key.endswith("blocks")}
        largest = max(counts.values() or lists, default=None)
        if (stated := largest if size is None else size) is not None:
            keys = tuple(key for key, value in counts.items() if size in (None, value))
            if keys or (not counts and stated in lists):
                yield Stack(path, keys, stated)
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from _stacks(value, (*path, key), size)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def part_at(config: Part, path: Path) -> Part | None:
    """The part of a config at a path; None if it has none there."""
    for key in path:
        inner = config.get(key)
        if not isinstance(inner, Mapping):
            return None
        config = inner
    return config


def model_of(config: Part, path: Path) -> str:
    """The model type of the part at a path, or else that of the model around it, without the ending `_text`."""
    types = [part.get("model_type") for end in range(len(path) + 1) if (part := part_at(config, path[:end]))]
    return next((kind for kind in reversed(types) if isinstance(kind, str)), "").removesuffix("_text")


def facts_of(part: Part, model: str, count: int) -> dict[str, Fact]:
    """All facts of the layers that a config of this model type states or implies, by the names of its entries."""
    rules = rules_of(part, model)
    used = {
        key for rule in rules for key in rule.keys if not (key.endswith("_freq") and isinstance(part.get(key), list))
    }
    facts = {".".join(path): fact for path, fact in _entries(part, (), count) if path[0] not in used}
    for rule in rules:
        facts.setdefault(rule.fact, Fact(rule.values(part, count), "rule"))
    if model in _LAST_FULL and "layer_types" in facts:
        types = facts["layer_types"]
        facts["layer_types"] = replace(types, values=[*types.values[:-1], FULL])
    if (size := part.get("sliding_window")) is not None and "layer_types" in facts:
        windows = [size if "sliding" in str(kind) else None for kind in facts["layer_types"].values]
        facts["sliding_window"] = Fact(windows, "window")
    return facts


def _entries(part: Part, path: Path, count: int) -> Iterator[tuple[Path, Fact]]:
    for key, value in part.items():
        place = (*path, key)
        if isinstance(value, Mapping):
            if _is_table(key, value):
                entries = {int(layer): entry for layer, entry in value.items()}
                yield place, Fact([entries.get(layer) for layer in range(count)], "table")
            elif not _APART.search(key) and not any(_COUNT.fullmatch(inner) for inner in value):
                yield from _entries(value, place, count)
        elif fact := _read(key, value, count):
            yield place, fact


def _is_table(key: str, value: Part) -> bool:
    """Whether a mapping is one from the numbers of layers."""
    return ("layer" in key or key == "pruned_heads") and bool(value) and all(layer.isdigit() for layer in value)


def _read(key: str, value: Any, count: int) -> Fact | None:
    """The fact that an entry states of each layer; None if it is about something else."""
    if _INDICES.fullmatch(key) and isinstance(value, list | str) and (layers := _numbers(value)) is not None:
        first = int(key in _FROM_ONE)
        return Fact([layer + first in layers for layer in range(count)], _form(value))
    if isinstance(value, list) and key in _POINTERS and len(value) == count:
        return Fact([source - layer for layer, source in enumerate(value)], "pointers")
    if (
        isinstance(value, list)
        and value
        and (len(value) == count or _KNOWN.fullmatch(key))
        and not _OTHER.fullmatch(key)
    ):
        return Fact(value, "list")
    if isinstance(value, str) and key.endswith("_pattern") and len(value) == count and not _OTHER.fullmatch(key):
        return Fact(list(value), "letters")
    if _PERIOD.fullmatch(key) and isinstance(value, int) and value > 1:
        return Fact([layer % value for layer in range(count)], "fixed")
    if _SOME.fullmatch(key) and not _OTHER.fullmatch(key) and isinstance(value, list) and (layers := _numbers(value)):
        return Fact([layer in layers for layer in range(count)], "fixed")
    return None


def _form(value: list[Any] | str) -> Form:
    return "enumeration" if isinstance(value, str) else "indices"


def _numbers(value: list[Any] | str) -> set[int] | None:
    """The layers of a list or of a text such as "3,4,5"; None if it holds anything else."""
    parts: Iterable[Any] = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    numbers = [part for part in parts if str(part).strip().lstrip("-").isdigit() and not isinstance(part, bool)]
    return {int(part) for part in numbers} if len(numbers) == len(list(parts)) else None


def entry_of(fact: Fact, name: str, values: Sequence[Any]) -> Any:
    """The entry of a config that states these values in the form of a fact."""
    first = int(name.rpartition(".")[2] in _FROM_ONE)
    match fact.form:
        case "indices" | "enumeration":
            layers = [layer + first for layer, value in enumerate(values) if value]
            return layers if fact.form == "indices" else ",".join(map(str, layers))
        case "pointers":
            return [layer + offset for layer, offset in enumerate(values)]
        case "letters":
            return "".join(values)
        case "table":
            return {str(layer): value for layer, value in enumerate(values) if value is not None}
    return list(values)
