"""Tiny models of the families that adapters differ on, and adapters as PEFT reads them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.tensor([[1, 5, 9, 2, 7]])


SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = SIZES | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
GPT2: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}


def _make(kind: str, **options: Any) -> Any:
    import transformers

    hub: Any = transformers
    if kind == "llama":
        return hub.LlamaForCausalLM(hub.LlamaConfig(**GROUPED | options, attention_bias=True, mlp_bias=True))
    if kind == "gpt2":
        return hub.GPT2LMHeadModel(hub.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2))
    if kind == "bert":
        return hub.BertForSequenceClassification(hub.BertConfig(**SIZES, num_labels=3))
    assert kind == "mixtral"
    return hub.MixtralForCausalLM(hub.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2))


def tiny_model(kind: str, **options: Any) -> Any:
    """A "llama", "gpt2", "bert" with a head or "mixtral", its weights so large that its outputs depend on all."""
    torch.manual_seed(0)
    model = _make(kind, **options).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.2 * torch.randn(x.shape))
    return model


def logits(model: Any) -> Tensor:
    """The model's outputs for the same few tokens."""
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def with_adapter(model: Any, adapter: Path) -> Any:
    """A copy of the model with the adapter, by peft. Asserts that it finds all keys, and has a place for each."""
    import peft

    with warnings.catch_warnings():
        # peft asks transformers for what that has renamed, and overlooks that it follows patterns about parameters
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", r"The following \w+ keys did not match any targeted module", RuntimeWarning)
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    result: Any = peft.set_peft_model_state_dict(wrapped, peft.load_peft_weights(str(adapter)))
    own = [name for name in result.missing_keys if "lora_" in name or "modules_to_save.default" in name]
    assert not result.unexpected_keys and not own
    return wrapped.eval()


class Net(nn.Module):
    """A model whose modules' names end alike, with a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "post_norm": nn.LayerNorm(6)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(self.conv(x).mean((2, 3)))
        return self.inner["post_norm"](self.inner["proj"](self.inner["norm"](x)))  # type: ignore[no-any-return]
