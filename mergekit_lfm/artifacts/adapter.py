"""Adapters as they are saved: what the config says, and the tensors by the module of the model that each belongs to.

PEFT writes a folder with adapter_config.json; trainers of image models write one file, with every module's `alpha` in
it. Reading an adapter reads headers, and needs neither PEFT nor torch unless a file has such numbers.
Source: peft 0.21, utils/save_and_load.py; kohya-ss/sd-scripts, networks/lora.py; diffusers,
loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lfm.artifacts.attachment import refuse_attachment
from mergekit_lfm.artifacts.patterns import Patterns
from mergekit_lfm.errors import FormatError, shorten
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.elsewhere import Elsewhere
from mergekit_lfm.store.files import read_json
from mergekit_lfm.store.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mergekit_lfm.store.tensors import FLOATS, TensorSpec, read_header

# The tensors of an adapter for one module, by PEFT's names; each also has an end, `.weight` or `.bias`, or none.
_PARTS = (
    "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector hada_w1_a hada_w1_b hada_w2_a hada_w2_b "
    "hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 ia3_l vera_lambda_b vera_lambda_d "
    "vera_A vera_B trainable_tokens_delta alpha"
)
_PART = re.compile(rf"^(?:(.*)\.)?({_PARTS.replace(' ', '|')})(?:\.(?!weight$|bias$)[^.]+)?(?:\.(weight|bias))?$")

# Names that other programs give to the same parts, and wrappers of PEFT in the names of modules.
_SPELLINGS = (
    (re.compile(r"(?:\.|_)lora(?:_linear_layer)?(?:\.|_)down\.weight$"), ".lora_A.weight"),
    (re.compile(r"(?:\.|_)lora(?:_linear_layer)?(?:\.|_)up\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.dora_scale$"), ".lora_magnitude_vector"),
    (re.compile(r"\.processor\.to_out\."), ".to_out.0."),
    (re.compile(r"\.processor\.(to_\w+)\."), r".\1."),
)
_WRAPPERS = re.compile(
    r"\.(?:token_adapter|(?:modules_to_save|ln_tuning_layers)(?:\.(?!weight$|bias$)[^.]+(?=\.))?)(?=\.|$)"
)
_PREFIXES = ("base_model.model.", "base_model.")
DIFFUSERS = "lora_adapter_metadata"  # the key of a header under which diffusers has PEFT's config
_KINDS = {"hada": "LOHA", "lokr": "LOKR", "ia3_": "IA3"}  # by how the names of their parts begin
NESTED = ".base_layer"  # PEFT's wrapper of what another one wraps

# The keys of a config without an effect on what the adapter does to its model.
_IDLE = (
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode "
    "init_weights layers_pattern layers_to_transform lora_dropout lora_ga_config loftq_config megatron_config "
    "megatron_core module_dropout modules_to_save peft_type peft_version projection_prng_key qalora_group_size "
    "rank_dropout rank_dropout_scale revision runtime_config save_projection target_modules task_type velora_config "
    "vera_dropout d_initial use_effective_conv2d decompose_both decompose_factor init_ia3_weights "
    "merge_weights loraplus_lr_ratio bias lora_bias use_dora"
)
IDLE = frozenset(_IDLE.split())


@dataclass(frozen=True)
class Module:
    """The tensors of an adapter for one module of the model: its name there, and their specs by the part's name.

    depth: the number of PEFT's wrappers around the one that they belong to.
    """

    name: str
    parts: Mapping[str, TensorSpec]
    depth: int = 0


@dataclass(frozen=True)
class Adapter:
    """An adapter: its label in messages, its config, {} for a file without one, and its tensors.

    modules: those with parts. saved: the tensors that stand in place of the model's, by the name there.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Checkpoint
    modules: tuple[Module, ...]
    saved: Mapping[str, TensorSpec]

    @property
    def kind(self) -> str:
        """PEFT's name of its kind: "LORA" and so on; that which its tensors show for a file without a config."""
        if "peft_type" in self.config:
            return str(self.config["peft_type"])
        return self.kind_of(self.modules[0]) if self.modules else "LORA"

    def kind_of(self, module: Module) -> str:
        """The kind of a module: trainers of image models mix them in a file, which has no config."""
        if "peft_type" in self.config:
            return self.kind
        starts = {part[:4] for part in module.parts}
        return next((kind for start, kind in _KINDS.items() if start in starts), "LORA")

    @property
    def base(self) -> str | None:
        """The model that it says it was trained on."""
        return self.config.get("base_model_name_or_path") or None

    @cached_property
    def rank_patterns(self) -> Patterns:
        return Patterns(self.config.get("rank_pattern") or {})

    @cached_property
    def alpha_patterns(self) -> Patterns:
        return Patterns(self.config.get("alpha_pattern") or {})

    @cached_property
    def key(self) -> dict[str, Any]:
        """All of its config that its effect depends on."""
        return _effective(self.config)


def open_adapter(source: Path | Elsewhere, label: str | None = None) -> Adapter:
    """The adapter in a folder, in a file, or on the Hub. Raises FormatError if it is damaged or of no known form."""
    label = str(source) if label is None else label
    refuse_attachment(source, label)
    tensors = open_checkpoint(source, adapter=True)
    config = _read_config(tensors, label)
    modules, saved = _sort(tensors, label)
    parts = [spec for own in modules for part, spec in own.parts.items() if part != "alpha"]  # which may be an integer
    strange = [str(spec) for spec in parts if spec.dtype not in FLOATS]
    if strange:
        raise FormatError(
            f"{label} has tensors that are not floating-point numbers: {shorten(strange, 3)}; save it anew"
        )
    if not (modules or saved):
        raise FormatError(f"{label} holds no tensor of an adapter, but {', '.join([*tensors][:3]) or 'nothing'}")
    return Adapter(label, config, tensors, modules, saved)


def _read_config(tensors: Checkpoint, label: str) -> dict[str, Any]:
    """The config of an adapter's folder, also if its file is named; of another program's file what is in its header.

    Raises FormatError for an adapter of PEFT's without one.
    """
    path = tensors.path
    if not path.is_dir():
        if not any(name.startswith(_PREFIXES) for name in tensors):
            config = _read_metadata(path, label) if tensors.files[0].is_safetensors else {}
            _check_patterns(config, f"{label}, {DIFFUSERS}")
            return config
        if path.name not in ADAPTER_WEIGHTS:
            raise FormatError(
                f"{label} is PEFT's, which has the scales in {ADAPTER_CONFIG}: put that beside it, call it "
                f"{ADAPTER_WEIGHTS[0]}, and name the folder"
            )
        path, label = path.parent, str(path.parent)
    if not (path / ADAPTER_CONFIG).is_file():
        raise FormatError(f"{label} has no {ADAPTER_CONFIG}, which says how its tensors are applied; copy it there")
    config = read_json(path / ADAPTER_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FormatError(
            f"{label}/{ADAPTER_CONFIG}: expected an object with peft_type, found {json.dumps(config):.60}"
        )
    _check_patterns(config, f"{label}/{ADAPTER_CONFIG}")
    return config


def _read_metadata(file: Path, label: str) -> dict[str, Any]:
    """The config that diffusers writes into a file's header, with the model's name before each key; {} without one."""
    text = read_header(file).metadata.get(DIFFUSERS)
    if text is None:
        return {}
    try:
        data = json.loads(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in data.items():
            configs.setdefault(key.rpartition(".")[0], {"peft_type": "LORA"})[key.rpartition(".")[2]] = value
    except (ValueError, AttributeError):
        raise FormatError(f"{label}: its {DIFFUSERS} is {text!r:.60}, expected an object; save it anew") from None
    different = {json.dumps(_effective(config)) for config in configs.values()}
    if len(different) > 1:
        raise FormatError(
            f"{label} has adapters of {shorten([*configs], 3)}, with other ranks or alphas; save each by itself"
        )
    return next(iter(configs.values()), {})


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of a config that the adapter's effect depends on."""
    return {name: value for name, value in sorted(config.items()) if name not in IDLE and value}


def _check_patterns(config: Mapping[str, Any], place: str) -> None:
    """Raise FormatError if a pattern in the config is not a regular expression, or names are not texts."""
    stated = config.get("target_parameters") or []
    if not isinstance(stated, list) or not all(isinstance(each, str) for each in stated):
        raise FormatError(f"{place}: target_parameters has {stated!r:.60}, expected a list of names; correct it")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or any(type(value) not in {int, float} for value in patterns.values()):
            expected = "expected an object with a number for each regular expression"
            raise FormatError(f"{place}: {key} has {patterns!r:.60}, {expected}; correct it")
        for pattern in patterns:
            try:
                Patterns({pattern: 1})
            except re.error as error:
                raise FormatError(
                    f"{place}: {key} has {pattern!r:.60}, expected a regular expression ({error}); correct it"
                ) from None


def _sort(tensors: Mapping[str, TensorSpec], label: str) -> tuple[tuple[Module, ...], dict[str, TensorSpec]]:
    """The modules of an adapter's tensors, and those that are tensors of the model.

    Raises FormatError for tensors that stand for the same, as in a file of several adapters.
    """
    modules, saved = dict[tuple[str, int], dict[str, TensorSpec]](), dict[str, TensorSpec]()
    twice = list[str]()
    for name, spec in tensors.items():
        if ".original_module." in name:
            continue  # what a saved module was before, which some versions of PEFT have written
        plain = _plain(name)
        match = _PART.match(plain)
        if match is None:
            own, key = saved, plain.replace(NESTED, "")
        else:
            module, part, end = match[1] or "", match[2], match[3]
            own = modules.setdefault((module.replace(NESTED, ""), module.count(NESTED)), {})
            key = f"{part}.bias" if end == "bias" else part
        if own.setdefault(key, spec) != spec:
            twice.append(f"{own[key].name} and {name}")
    if twice:
        raise FormatError(
            f"{label} has two tensors for one: {shorten(twice, 3)}; save each adapter in a file of its own"
        )
    for place in [place for place, parts in modules.items() if parts.keys() == {"alpha"}]:
        saved[f"{place[0]}.alpha".lstrip(".")] = modules.pop(place)["alpha"]  # the number alpha is beside matrices
    return tuple(Module(name, parts, depth) for (name, depth), parts in modules.items()), saved


def _plain(name: str) -> str:
    """A tensor's name without what PEFT puts before and into it, in PEFT's words."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    for pattern, spelling in _SPELLINGS:
        name = pattern.sub(spelling, name)
    return _WRAPPERS.sub("", name)


def dropped_of(adapter: Adapter) -> Iterator[str]:
    """The tensors in the adapter's file that it does not use."""
    used = {spec.name for module in adapter.modules for spec in module.parts.values()}
    used |= {spec.name for spec in adapter.saved.values()}
    return (name for name in adapter.tensors if name not in used)
