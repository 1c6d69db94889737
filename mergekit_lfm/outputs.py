"""Compare the outputs of two models: make inputs for a model, and measure how far apart two outputs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.data import Batch
from mergekit_lfm.rewriting import only_moves
from mergekit_lfm.runtime import Loaded, embeddings, load_as_saved, load_model, logits, run
from mergekit_lfm.transforms import Transform

EXAMPLES, TOKENS, PIXELS = 4, 32, 64
# Equal models differ by 2e-6 if sums have another order; a transform that is wrong makes differences of about 1.
ROUNDING = 1e-4
MARGIN = 4  # random transforms of random Llamas, rounded to 16 bits, made 0.5 to 1.8 times the difference of such noise


def probe(model: Loaded, seed: int = 0) -> Batch:
    """Random inputs that fit the model's config: token ids [4, up to 32], or images [4, channels, h, w].

    Images are 64 x 64 if the model takes any size.
    """
    config: Any = model.model.config
    draw = torch.Generator().manual_seed(seed)
    rows = tuple(range(EXAMPLES))
    if getattr(model.model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or PIXELS
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(EXAMPLES, getattr(config, "num_channels", 3), height, width, generator=draw)
        return Batch(rows, kwargs={"pixel_values": images})
    # RoBERTa's positions begin after its padding token's, 1
    length = max(1, min(TOKENS, (model.positions or TOKENS + 2) - 2))
    vocabulary = config.get_text_config().vocab_size
    return Batch(rows, kwargs={"input_ids": torch.randint(vocabulary, (EXAMPLES, length), generator=draw)})


def forward(module: nn.Module, batch: Batch) -> Any:
    """Run the module on a batch, moved to its device and dtype."""
    moved = batch.to(module)
    return run(module, moved.args, moved.kwargs)


def answer(model: Loaded | nn.Module, inputs: Batch) -> Tensor:
    """The logits, or an encoder's embeddings, on these inputs, float64 on the CPU; first axis = examples."""
    module = model.model if isinstance(model, Loaded) else model
    with torch.inference_mode():
        output = forward(module, inputs)
        encoder = isinstance(model, Loaded) and model.task == "embedding"
        y = embeddings(output) if encoder else logits(output)
    return y.double().cpu()


def difference(first: Loaded | nn.Module, second: Loaded | nn.Module, inputs: Batch) -> float:
    """How far apart the models' outputs are: the largest |y - y'| as a fraction of the largest |y - mean y|.

    y are the first one's outputs, their mean is over examples and tokens. 0 if all are equal; infinity if the shapes
    differ, if one has NaN, or if y does not depend on the inputs and y' differs from y.
    """
    return _distance(answer(first, inputs), answer(second, inputs))


def _distance(y: Tensor, other: Tensor) -> float:
    if y.shape != other.shape:
        return float("inf")
    if torch.equal(y, other):
        return 0.0
    rows = y.reshape(-1, y.shape[-1])
    spread = float((rows - rows.mean(0)).abs().max())
    apart = float((y - other).abs().max())
    return apart / spread if spread > 0 and apart == apart and spread == spread else float("inf")


def all_outputs(model: Loaded, inputs: Batch) -> Tensor:
    """All tensors that the model returns for these inputs, one row per input, in its dtype."""
    with torch.inference_mode():
        output = forward(model.model, inputs)
    tensors = [x for x in output.to_tuple() if isinstance(x, Tensor) and x.shape[:1] == (len(inputs),)]
    return torch.cat([x.flatten(1) for x in tensors], 1)


def compare_outputs(model: str | Path, rewritten: str | Path, transform: Transform) -> tuple[float, float]:
    """The `difference` between a model and its rewritten copy, two folders, and how much of it rounding explains.

    Both run in float32. An order changes only the order of sums. Products are rounded to the stored dtype: the effect
    of such noise in all parameters on the outputs is measured. Encoders are compared with the head that they were saved
    with: without it, the transform shows in their hidden states.
    """
    checkpoint = open_checkpoint(model)
    task = _task_of(checkpoint)
    with_head = task == "embedding" and bool(checkpoint.config.get("architectures"))
    first, second = (
        _with_head(open_checkpoint(path)) if with_head else load_model(path, task) for path in (model, rewritten)
    )
    outputs_of = all_outputs if with_head else answer
    inputs = probe(first)
    before = outputs_of(first, inputs)
    distance = _distance(before.double(), outputs_of(second, inputs).double())
    if only_moves(transform):
        return distance, ROUNDING
    del second
    kinds = {getattr(torch, spec.dtype) for spec in checkpoint.values()}
    coarsest = max(torch.finfo(kind).eps for kind in kinds | {torch.float32} if kind.is_floating_point)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for x in first.model.parameters():
            x.mul_(1 + coarsest * (torch.rand(x.shape, generator=draw) - 0.5))  # at most half a step
    return distance, max(ROUNDING, MARGIN * _distance(before.double(), outputs_of(first, inputs).double()))


def _with_head(checkpoint: Checkpoint) -> Loaded:
    """The model of the class that its config names, in float32."""
    tensors = {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}
    return load_as_saved(
        checkpoint.path, {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    )


def _task_of(checkpoint: Checkpoint) -> str:
    """The task of a saved model, by the name of its class: "lm", "classification", else "embedding"."""
    names = " ".join(checkpoint.config.get("architectures") or [])
    if "ForCausalLM" in names or "LMHeadModel" in names:
        return "lm"
    return "classification" if "Classification" in names and "Token" not in names else "embedding"
