"""Compare the outputs of two models: make inputs for a model, and measure how far apart two outputs are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.runtime.batches import Batch
from mergekit_lfm.runtime.load import Loaded, embeddings, logits, run

EXAMPLES, TOKENS, PIXELS = 4, 32, 64


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


def outputs_of(model: Loaded | nn.Module, inputs: Batch) -> Tensor:
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
    return relative_distance(outputs_of(first, inputs), outputs_of(second, inputs))


def relative_distance(y: Tensor, other: Tensor) -> float:
    """The largest |y - y'| as a fraction of the largest |y - mean y|; see `difference`."""
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
    found = [x for x in output.to_tuple() if isinstance(x, Tensor) and x.shape[:1] == (len(inputs),)]
    return torch.cat([x.flatten(1) for x in found], 1)
