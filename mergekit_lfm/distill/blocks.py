"""Layers of a model that are fed with states from elsewhere, in place of those that come from the layers before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.watch import Part, lengths_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.losses import widen


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a model of transformers. Raises PlanError for a model without a list of as many as it names."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    count = getattr(text, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise PlanError(f"{type(model).__name__} has no list of {count} layers, which lit feeds; leave lit out")
    return lists[0]


@contextmanager
def fed(model: nn.Module, states: Mapping[int, Tensor]) -> Iterator[dict[int, Tensor]]:
    """Feed layers of a model with states [n, tokens, d], by the number of layers before them, while it runs.

    The value has what the model itself would have given them.
    """
    layers, given, handles = layers_of(model), dict[int, Tensor](), list[Any]()

    def feed(number: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if arguments:
                given[number] = arguments[0]
                return (states[number].to(arguments[0]), *arguments[1:]), options
            given[number] = options["hidden_states"]
            return arguments, {**options, "hidden_states": states[number].to(given[number])}

        return hook

    try:
        for number in states:
            if number < len(layers):
                handles.append(layers[number].register_forward_pre_hook(feed(number), with_kwargs=True))
        yield given
    finally:
        for handle in handles:
            handle.remove()


def padded(part: Part, batch: Batch) -> Tensor:
    """Rows of all examples as [n, tokens, d], with 0 for tokens that are not there."""
    rows = torch.split(part.values, list(part.counts))
    return torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True) if lengths_of(batch) else torch.stack(rows)


def unpadded(states: Tensor, batch: Batch) -> Part:
    """States [n, tokens, d] as rows."""
    lengths = lengths_of(batch) or (states.shape[1],) * len(states)
    return Part(widen(torch.cat([x[:length] for x, length in zip(states, lengths, strict=True)])), tuple(lengths))
