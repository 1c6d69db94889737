"""Tiny models with their tables for tests of alignment, and transforms to plant in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergekit_lfm.align.choices import polar
from mergekit_lfm.align.elements import ElementKind, random_transform
from mergekit_lfm.arch import Symmetries, Units, find_symmetries, read_table
from mergekit_lfm.artifacts.transform import HeadsElement, Transform, UnitsElement
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint

Tensors = dict[str, Tensor]

VOCABULARY = 90


def mlp(widths: Sequence[int], seed: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> Tensors:
    """Random weights of layers 0, 1, ... and biases."""
    draw = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        made[f"{i}.weight"] = torch.randn(outputs, inputs, generator=draw, dtype=dtype) / inputs**0.5
        if bias:
            made[f"{i}.bias"] = torch.randn(outputs, generator=draw, dtype=dtype)
    return made


def mlp_table(widths: Sequence[int]) -> Symmetries:
    """The table of `mlp`: groups p0, p1, ..."""
    last = len(widths) - 2
    lines = []
    for i in range(last + 1):
        out, read = "class" if i == last else f"p{i}", "input" if i == 0 else f"p{i - 1}'"
        lines += [f"{i}.weight {out} {read}", f"{i}.bias? {out}"]
    names = [f"{i}.{part}" for i in range(last + 1) for part in ("weight", "bias")]
    return read_table("\n".join(lines), {f"p{i}": Units(n) for i, n in enumerate(widths[1:-1])}, names)


def table_of(tensors: Tensors, widths: Sequence[int]) -> Symmetries:
    """`mlp_table` of these tensors."""
    whole = mlp_table(widths)
    return Symmetries(whole.groups, {name: axes for name, axes in whole.tensors.items() if name in tensors})


def run_mlp(tensors: Tensors, inputs: Tensor) -> Tensor:
    """The logits of `mlp` with ReLU."""
    x, layers = inputs, sum(name.endswith("weight") for name in tensors)
    for i in range(layers):
        x = x @ tensors[f"{i}.weight"].T + tensors.get(f"{i}.bias", torch.zeros(()))
        x = x.relu() if i < layers - 1 else x
    return x


class Convolutions(nn.Module):
    """A convolution, a block with a skip path, BatchNorm, and a layer that reads all pixels; images [n, 3, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.first, self.first_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(images)).relu()
        x = x + self.second(self.first_norm(self.first(x)).relu())
        logits: Tensor = self.head(nn.functional.max_pool2d(x, 2).flatten(1))
        return logits


CONVOLUTIONS = """
stem.weight                      skip:order    input    kernel  kernel
first.weight                     inside:order  skip'    kernel  kernel
second.weight                    skip          inside'  kernel  kernel
second.bias                      skip
head.weight                      class         skip'
head.bias                        class
""" + "".join(
    f"{norm}_norm.{part} {group}{view}\n"
    for norm, group in (("stem", "skip"), ("first", "inside"))
    for part, view in (("weight", ""), ("bias", ""), ("running_mean", ":order"), ("running_var", ":order"))
)


def convolutions(seed: int) -> tuple[Convolutions, Symmetries]:
    """A model with random weights and running statistics, and its table."""
    model = Convolutions().eval()
    randomise(model, seed)
    groups = {"skip": Units(6), "inside": Units(8)}
    text = CONVOLUTIONS + "stem_norm.num_batches_tracked\nfirst_norm.num_batches_tracked\n"
    return model, read_table(text, groups, model.state_dict())


def randomise(model: nn.Module, seed: int) -> None:
    """Random values in every parameter and floating buffer: gains near 1, variances positive."""
    draw = torch.Generator().manual_seed(seed)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if not x.is_floating_point() or name.endswith("inv_freq"):
            continue
        random = torch.randn(x.shape, generator=draw, dtype=torch.float64)
        if name.endswith("running_var"):
            random = random.square() + 0.5
        elif x.ndim == 1:
            random = random * 0.3 + (1 if name.endswith("weight") else 0)
        else:
            random = random / x[0].numel() ** 0.5
        x.data.copy_(random)


def transformer(kind: str, seed: int, **options: Any) -> nn.Module:
    """A tiny random model of transformers, in evaluation mode."""
    import transformers as hub

    rotary = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    bert = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 30, "num_hidden_layers": 2}
    gpt2 = {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32}
    resnet: dict[str, Any] = {
        "embedding_size": 6,
        "hidden_sizes": [6, 10],
        "depths": [2, 1],
        "layer_type": "basic",
        "num_labels": 4,
    }
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: hub.LlamaForCausalLM(hub.LlamaConfig(**rotary | options)),
        "qwen2": lambda: hub.Qwen2ForCausalLM(hub.Qwen2Config(**rotary | options)),
        "qwen3": lambda: hub.Qwen3ForCausalLM(hub.Qwen3Config(**rotary | options)),
        "gpt2": lambda: hub.GPT2LMHeadModel(hub.GPT2Config(vocab_size=VOCABULARY, **gpt2 | options)),
        "bert": lambda: hub.BertForMaskedLM(hub.BertConfig(vocab_size=VOCABULARY, **bert | options)),
        "resnet": lambda: hub.ResNetForImageClassification(hub.ResNetConfig(**resnet | options)),
    }
    model: nn.Module = made[kind]().eval()
    randomise(model, seed)
    return model


def saved(model: nn.Module, folder: Path) -> Checkpoint:
    """The model's checkpoint, with the names of its files."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return open_checkpoint(folder)


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """All of a checkpoint's tensors."""
    return {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}


def loaded(kind: str, seed: int, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Checkpoint:
    """The checkpoint of a tiny random model."""
    return saved(transformer(kind, seed, **options).to(dtype), folder)


def planted(tensors: Tensors, symmetries: Symmetries, seed: int, *, rotate: bool = False) -> Transform:
    """A random permutation of every group, and inside of heads if the table allows it.

    rotate: orthogonal matrices and signs where the groups have them.
    """
    kinds: tuple[ElementKind, ...] = ("order", "scale", "rotation", "inside") if rotate else ("order",)
    made = random_transform(tensors, symmetries, seed=seed, kinds=kinds)
    draw = torch.Generator().manual_seed(seed)
    elements = dict(made.elements)
    for name, element in made.elements.items():
        if isinstance(element, UnitsElement) and element.scale is not None:
            elements[name] = UnitsElement(element.order, element.scale.sign())
        if isinstance(element, HeadsElement):
            group: Any = symmetries.groups[name]
            one = torch.eye(group.head_dim, dtype=torch.float64)
            orders = [
                torch.stack([one[torch.randperm(len(one), generator=draw)] for _ in range(group.groups)])
                for _ in range(2)
            ]
            elements[name] = HeadsElement(
                element.groups,
                element.queries,
                polars(element.query_key) if rotate else orders[0] if group.query_key == "linear" else None,
                polars(element.value_output) if rotate else orders[1],
            )
    return Transform(symmetries, elements, made.info, made.gains)


def polars(matrices: Tensor | None) -> Tensor:
    """The orthogonal matrices nearest to these."""
    assert matrices is not None
    return torch.stack([polar(matrix) for matrix in matrices])


def table(checkpoint: Checkpoint) -> Symmetries:
    """The table of a checkpoint, by its config."""
    return find_symmetries(checkpoint)


def furthest(found: Tensors, expected: Tensors) -> float:
    """The greatest difference of two models' tensors, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-30))
        for name, x in expected.items()
        if x.is_floating_point()
    )


def rewritten_model(checkpoint: Checkpoint, tensors: Tensors, folder: Path) -> Checkpoint:
    """A checkpoint with the config of another, and these tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder)


def texts(seed: int = 0, count: int = 4) -> list[dict[str, Tensor]]:
    """Batches of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCABULARY, (8, 16), generator=draw)} for _ in range(count)]
