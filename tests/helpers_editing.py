"""ROME and MEMIT as the papers write them, one fact and one text at a time, in float64; and models to run them on.

Nothing here is of the package: positions come from counting the tokens of what stands before, texts are never padded,
systems are solved densely. Source: ROME, arXiv 2202.05262, section 3.1 and appendix E; MEMIT, arXiv 2210.07229,
section 4; r-ROME, arXiv 2403.07175.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "Ada Blake was born in the city of Paris . Leo Wagner was born in the city of Rome .",
    "Mia Stone speaks Danish . Zoë Müller works as a baker . The language of Ada Blake is Danish .",
    "Yesterday it rained . Leo Wagner works as a glass blower in New York .",
    "It is said that Mia Stone is a good baker .",
]
SIZE = {"vocab_size": 340, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.25}
LLAMA = SIZE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
GPT2 = SIZE | {"n_embd": 32, "n_inner": 48, "n_head": 2, "n_layer": 4, "n_positions": 48}
NEO = SIZE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 4,
    "num_heads": 2,
    "attention_types": [[["local", "global"], 2]],
    "window_size": 3,
    "max_position_embeddings": 48,
}
GPTJ = GPT2 | {"rotary_dim": 8}
# Name: the class, its config, the path of its blocks, and the down-projection of a block's MLP.
MODELS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, "transformer.h", "c_proj"),
    "gpt2-square": ("GPT2LMHeadModel", GPT2 | {"n_inner": 32, "tie_word_embeddings": False}, "transformer.h", "c_proj"),
    "llama": ("LlamaForCausalLM", LLAMA | {"mlp_bias": True}, "model.layers", "down_proj"),
    "mistral": ("MistralForCausalLM", LLAMA, "model.layers", "down_proj"),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, "model.layers", "down_proj"),
    "qwen3-tied": (
        "Qwen3ForCausalLM",
        LLAMA | {"head_dim": 8, "tie_word_embeddings": True},
        "model.layers",
        "down_proj",
    ),
    "gpt-neo": ("GPTNeoForCausalLM", NEO, "transformer.h", "c_proj"),
    "gpt-j": ("GPTJForCausalLM", GPTJ, "transformer.h", "fc_out"),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One of MODELS with random weights, also in biases, in evaluation mode. Its large head makes it sure of tokens."""
    kind, config, _, _ = MODELS[name]
    torch.manual_seed(1)
    owner = getattr(transformers, kind)
    model: nn.Module = owner(owner.config_class(**config)).to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
        model.get_output_embeddings().weight.mul_(4)  # type: ignore[operator]
    return model


@cache
def trained_tokenizer(kind: str = "gpt2") -> Any:
    """Byte pairs learnt from TEXTS.

    "gpt2" adds nothing, "trimmed" leaves spaces out of its offsets, "llama3" puts <s> before each text, "ended" </s>
    after it, too. "llama2" marks words by ▁ instead, and "prepended" puts one before each text, as Llama 2 does.
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = kind in ("llama2", "prepended")
    if kind == "llama2":
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    elif kind == "prepended":
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        inner.normalizer = tokenizers.normalizers.Sequence(steps)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    else:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.ëü"))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE["vocab_size"],
        initial_alphabet=letters if words else tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    if kind == "trimmed":
        inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    elif kind != "gpt2":
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>" if kind == "ended" else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", model_max_length=48
    )


@dataclass
class Plain:
    """The plain editor of one model. `layers` are edited; updates: the number of moves of each delta, in order."""

    name: str
    model: nn.Module
    tokenizer: Any
    layers: Sequence[int]
    templates: Sequence[str | Sequence[str]]
    covariance: dict[int, Tensor]
    steps: int = 4
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0
    loss_threshold: float = 0.05
    ridge: float = 1e-3
    lambda_: float = 10.0
    kl_template: str = "{} is a"
    reverse_kl: bool = False
    updates: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).requires_grad_(False)
        _, _, blocks, self.down = MODELS[self.name]
        self.blocks: list[Any] = list(self.model.get_submodule(blocks).children())

    def projection(self, layer: int) -> Any:
        return self.blocks[layer].mlp.get_submodule(self.down)

    def weight(self, layer: int) -> Tensor:
        """The projection's weight, [out, in], a view of it."""
        weight: Tensor = self.projection(layer).weight
        return weight.T if self.name.startswith("gpt2") else weight

    @property
    def flat(self) -> list[str]:
        return [text for entry in self.templates for text in ([entry] if isinstance(entry, str) else entry)]

    @property
    def types(self) -> list[list[str]]:
        """The types of context; a flat list has two: the bare prompt, and all others."""
        if all(isinstance(entry, str) for entry in self.templates):
            groups = [["{}"], [entry for entry in self.flat if entry != "{}"]]
            return [group for group in groups if group]
        return [[entry] if isinstance(entry, str) else list(entry) for entry in self.templates]

    def regularised(self, layer: int) -> Tensor:
        covariance = self.covariance[layer].double()
        covariance = (covariance + covariance.T) / 2
        return covariance + self.ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)

    # ---------------------------------------------------------- positions and texts

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text that continues, without a token that ends it."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def filled(self, template: str, prompt: str, subject: str) -> tuple[list[int], int]:
        """The tokens of a prompt in its context, and the index of the last one of the subject."""
        before, after = template.replace("{}", prompt).split("{}")
        ids, until = self.tokens(before + subject + after), self.tokens(before + subject)
        assert ids[: len(until)] == until
        return ids, len(until) - 1

    def target(self, fact: dict[str, str]) -> list[int]:
        """The tokens by which the bare prompt continues."""
        text = fact["prompt"].replace("{}", fact["subject"])
        asked, whole = self.tokens(text), self.tokens(f"{text} {fact['target_new']}")
        assert whole[: len(asked)] == asked
        return whole[len(asked) :]

    # ---------------------------------------------------------- forward passes

    @contextmanager
    def hooked(self, module: nn.Module, change: Callable[[Tensor], Tensor], *, inputs: bool = False) -> Iterator[None]:
        """While open, `change` sees and replaces a module's output, or sees its input."""

        def output_hook(_: nn.Module, given: Any, out: Any) -> Any:
            if inputs:
                change(given[0])
                return out
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        handle = module.register_forward_hook(output_hook)
        try:
            yield
        finally:
            handle.remove()

    def logits(self, ids: list[int]) -> Tensor:
        out: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return out

    def state(self, module: nn.Module, ids: list[int], at: int, *, inputs: bool = False) -> Tensor:
        """A module's output, or input, at a position."""
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x[0, at].clone())
            return x

        with torch.no_grad(), self.hooked(module, keep, inputs=inputs):
            self.logits(ids)
        return seen[0]

    def key(self, fact: dict[str, str], template: str, layer: int) -> Tensor:
        return self.state(self.projection(layer), *self.filled(template, fact["prompt"], fact["subject"]), inputs=True)

    def bare(self, fact: dict[str, str], module: nn.Module) -> Tensor:
        return self.state(module, *self.filled("{}", fact["prompt"], fact["subject"]))

    # ---------------------------------------------------------- the value that produces the new fact

    def value(self, fact: dict[str, str], module: nn.Module) -> tuple[Tensor, Tensor]:
        """v0 and delta. Source: ROME equation 4, with the weight decay and the clamp of its appendix E.5."""
        target = self.target(fact)
        texts = [self.filled(template, fact["prompt"], fact["subject"]) for template in self.flat]
        texts = [(ids + target[:-1], at) for ids, at in texts]
        asked = self.filled("{}", self.kl_template, fact["subject"])
        v0 = self.bare(fact, module)
        with torch.no_grad():
            before = self.logits(asked[0])[asked[1]].log_softmax(-1)
        delta = torch.zeros_like(v0, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=self.lr)
        updates = 0
        for step in range(self.steps):
            losses = [self._surprise(*text, target, module, delta) for text in texts]
            after = self._with(*asked, module, delta)[asked[1]].log_softmax(-1)
            first, second = (before, after) if self.reverse_kl else (after, before)
            kl = (first.exp() * (first - second)).sum()
            loss = torch.stack(losses).mean() + self.kl_factor * kl
            loss = loss + self.weight_decay * delta.norm() / v0.norm() ** 2 if updates else loss
            if float(loss.detach()) < self.loss_threshold or step == self.steps - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            with torch.no_grad():
                delta *= min(1.0, float(self.clamp * v0.norm() / delta.norm()))
        self.updates.append(updates)
        return v0, delta.detach()

    def _with(self, ids: list[int], at: int, module: nn.Module, delta: Tensor) -> Tensor:
        at_lookup = nn.functional.one_hot(torch.tensor(at), len(ids)).double()[None, :, None]
        with self.hooked(module, lambda x: x + at_lookup * delta):
            return self.logits(ids)

    def _surprise(self, ids: list[int], at: int, target: list[int], module: nn.Module, delta: Tensor) -> Tensor:
        told = self._with(ids, at, module, delta)[-len(target) :].log_softmax(-1)
        return -torch.stack([row[token] for row, token in zip(told, target, strict=True)]).mean()

    # ---------------------------------------------------------- the updates

    def rome(self, facts: Sequence[dict[str, str]], key: str = "rome") -> dict[int, Tensor]:
        """The change of the layer's weight, [out, in]. Source: ROME equation 2; r-ROME equations 2 and 3."""
        (layer,) = self.layers
        original = self.weight(layer).clone()
        for fact in facts:
            v0, delta = self.value(fact, self.blocks[layer].mlp)
            mean = torch.stack([self.key(fact, template, layer) for template in self.flat]).mean(0)
            bare = self.key(fact, "{}", layer)
            aimed, used = {"rome": (mean, bare), "mean": (mean, mean), "bare": (bare, bare)}[key]
            u = torch.linalg.solve(self.regularised(layer), aimed)
            bias = self.projection(layer).bias
            now = self.weight(layer) @ used + (0 if bias is None else bias)
            self.weight(layer).add_(torch.outer(v0 + delta - now, u) / (used @ u))
        return {layer: self.weight(layer) - original}

    def memit(self, facts: Sequence[dict[str, str]]) -> dict[int, Tensor]:
        """The change of each layer's weight, [out, in]. Source: MEMIT equations 14 and 20, algorithm 1."""
        original = {layer: self.weight(layer).clone() for layer in self.layers}
        last = self.blocks[self.layers[-1]]
        wanted = torch.stack([torch.add(*self.value(fact, last)) for fact in facts], 1)  # [out, facts]
        for i, layer in enumerate(self.layers):
            keys = torch.stack([self._mean_key(fact, layer) for fact in facts], 1)  # [in, facts]
            now = torch.stack([self.bare(fact, last) for fact in facts], 1)
            spread = (wanted - now) / (len(self.layers) - i)
            moved = torch.linalg.inv(self.lambda_ * self.regularised(layer) + keys @ keys.T)
            self.weight(layer).add_(spread @ keys.T @ moved)
        return {layer: self.weight(layer) - original[layer] for layer in self.layers}

    def _mean_key(self, fact: dict[str, str], layer: int) -> Tensor:
        kinds = [torch.stack([self.key(fact, template, layer) for template in kind]).mean(0) for kind in self.types]
        return torch.stack(kinds).mean(0)


def random_covariance(inputs: int, seed: int) -> Tensor:
    """A second moment of random keys, some far more important than others, [inputs, inputs]."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64)
    keys = keys * torch.logspace(-1, 1, inputs, dtype=torch.float64)
    return keys.T @ keys / len(keys)
