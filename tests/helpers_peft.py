"""Tiny models of four architectures, and adapters of every kind that PEFT makes for them, with random numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

SIZES: Mapping[str, Any] = MappingProxyType({"vocab_size": 40, "num_hidden_layers": 2})
WIDE: Mapping[str, Any] = MappingProxyType(
    {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, **SIZES}
)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
IDS = torch.arange(14).view(2, 7) * 5 % 39


def llama(**changes: Any) -> PreTrainedModel:
    biases: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=1, **biases, bos_token_id=1, **changes))


def gpt2() -> PreTrainedModel:
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, **ends))


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**WIDE, max_position_embeddings=16))


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(**WIDE, num_key_value_heads=1, num_local_experts=3, bos_token_id=1)
    config._experts_implementation = "eager"  # the others know no float64
    return MixtralForCausalLM(config)


def resnet() -> PreTrainedModel:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_channels=3))


MODELS: Mapping[str, Callable[[], PreTrainedModel]] = MappingProxyType(
    {
        "llama": llama,
        "tied": partial(llama, tie_word_embeddings=True),
        "gpt2": gpt2,
        "bert": bert,
        "mixtral": mixtral,
        "resnet": resnet,
    }
)


class Kind(NamedTuple):
    """A model, and how PEFT is asked for an adapter to it. merges: False where PEFT cannot save what it merged."""

    model: str
    config: Callable[..., peft.PeftConfig]
    options: Mapping[str, Any]
    merges: bool = True


def kind(model: str, config: Callable[..., peft.PeftConfig], *, merges: bool = True, **options: Any) -> Kind:
    return Kind(model, config, options, merges)


# The scale of a LoHa is a binary fraction here: PEFT rounds it to float32, also in float64.
LORA, BOTH = peft.LoraConfig, ["q_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "LoRA": kind("llama", LORA, r=4, target_modules=BOTH),
        "LoRA, ranks and alphas by pattern": kind(
            "llama",
            LORA,
            r=4,
            lora_alpha=7,
            target_modules=BOTH,
            rank_pattern={"down_proj": 3, "layers.1.self_attn.q_proj": 5},
            alpha_pattern={"layers.0.*.q_proj": 11},
        ),
        "rsLoRA": kind("llama", LORA, r=4, lora_alpha=3, use_rslora=True, target_modules=BOTH),
        "LoRA, all biases": kind("llama", LORA, r=4, bias="all", target_modules=BOTH),
        "LoRA, own biases": kind("llama", LORA, r=4, bias="lora_only", target_modules=BOTH),
        "LoRA, bias of B": kind("llama", LORA, r=4, lora_bias=True, target_modules=["q_proj"]),
        "DoRA": kind("llama", LORA, r=4, use_dora=True, target_modules=BOTH),
        "LoRA of embeddings and head": kind("llama", LORA, r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
        "DoRA of embeddings": kind("llama", LORA, r=4, use_dora=True, target_modules=["embed_tokens"]),
        "LoRA, trained tokens": kind(
            "llama", LORA, r=4, target_modules=BOTH, trainable_token_indices={"embed_tokens": [3, 1]}
        ),
        "LoRA of Conv1D": kind("gpt2", LORA, r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "DoRA of Conv1D": kind("gpt2", LORA, r=4, target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True),
        "LoRA of BERT with its head": kind(
            "bert", LORA, r=4, target_modules=["query", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS"
        ),
        "LoRA of experts": kind("mixtral", LORA, r=4, target_modules=["q_proj"], target_parameters=EXPERTS),
        "LoRA of experts and router": kind(
            "mixtral", LORA, r=2, target_modules=[], target_parameters=["gate.weight", *EXPERTS[1:]]
        ),
        "LoHa": kind("llama", peft.LoHaConfig, r=4, alpha=3, target_modules=BOTH),
        "LoKr": kind("llama", peft.LoKrConfig, r=2, alpha=3, target_modules=BOTH, decompose_both=True),
        "LoKr, whole": kind("llama", peft.LoKrConfig, r=40, alpha=3, target_modules=BOTH),
        "IA3": kind("llama", peft.IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "IA3 of Conv1D": kind(
            "gpt2",
            peft.IA3Config,
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        "LoRA of convolutions": kind("resnet", LORA, r=3, target_modules=["convolution"]),
        "DoRA of convolutions": kind("resnet", LORA, r=3, use_dora=True, target_modules=["convolution"]),
        "LoHa of convolutions": kind(
            "resnet", peft.LoHaConfig, r=4, alpha=2, target_modules=["convolution"], use_effective_conv2d=True
        ),
        "LoHa of convolutions, whole": kind("resnet", peft.LoHaConfig, r=4, target_modules=["convolution"]),
        "LoKr of convolutions": kind(
            "resnet", peft.LoKrConfig, r=2, alpha=2, target_modules=["convolution"], use_effective_conv2d=True
        ),
        "IA3 of convolutions": kind(
            "resnet",
            peft.IA3Config,
            target_modules=["layer.0.convolution", "layer.1.convolution"],
            feedforward_modules=["layer.1.convolution"],
        ),
        "VeRA": kind("llama", peft.VeraConfig, r=4, target_modules=BOTH),
        "LN tuning": kind("llama", peft.LNTuningConfig, target_modules=["input_layernorm", "norm"]),
        "LN tuning of BERT with its head": kind(
            "bert", peft.LNTuningConfig, target_modules=["LayerNorm"], modules_to_save=["classifier"], merges=False
        ),
        "trained tokens": kind(
            "llama", peft.TrainableTokensConfig, token_indices=[5, 2], target_modules=["embed_tokens"]
        ),
    }
)


class Made(NamedTuple):
    """A model with an adapter that is not merged yet, and the folders of both."""

    live: peft.PeftModel
    base: Path
    adapter: Path

    @property
    def reference(self) -> str:
        return f"{self.base}+{self.adapter}"


def make(
    folder: Path, model: str, config: peft.PeftConfig, dtype: torch.dtype = torch.float32, name: str = "adapter"
) -> Made:
    """Save the model as `folder`/base and a random adapter to it beside that."""
    torch.manual_seed(0)
    base: Any = MODELS[model]()
    base.to(dtype).eval().save_pretrained(folder / "base")
    return adapt(base, folder, config, name)


def adapt(base: Any, folder: Path, config: peft.PeftConfig, name: str) -> Made:
    """A random adapter to a model that is saved as `folder`/base; its numbers depend on its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about configs that it corrects
        live = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        draw = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) * 0.1)
        live.to(base.dtype).eval()
        live.save_pretrained(str(folder / name))
    return Made(live, folder / "base", folder / name)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's outputs on some tokens."""
    with torch.inference_mode():
        first = next(model.parameters())
        output: torch.Tensor = model(PIXELS.to(first.dtype) if first.ndim == 4 else IDS).logits
    return output


def change_config(adapter: Path, **changes: Any) -> Path:
    """Write other values to an adapter's config."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return adapter


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Write other tensors to an adapter's file."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: x.contiguous() for name, x in change(load_file(file)).items()}, file)
    return adapter
