"""The places in a transformer where a module can join: what attention and the feed-forward part of each layer write.

They are found from the model's structure: layers are the numbered modules that have attention. Of the matrices in a
layer, most read states of the model's width. The last one of attention that gives that width writes what attention
adds, and the one other matrix from another width to it what the feed-forward part adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from mergekit_lfm.errors import PlanError

Place = Literal["attention", "ffn"]
PLACES: tuple[Place, ...] = get_args(Place)
ATTENTION = "att"  # part of the names of attention in every architecture: attn, attention, self_attn
CURE = "give a model such as a BERT, a Llama, a GPT-2 or an OPT, or choose a method that trains weights"


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a layer. layer: its name in the trunk. width: of the states.

    reads: the first matrix of the part, whose input is the part's. writes: the last, whose output is what it adds.
    """

    layer: str
    place: Place
    width: int
    module: nn.Module
    reads: nn.Module
    writes: nn.Module


def trunk_of(model: nn.Module) -> nn.Module:
    """The model without its head: the part that transformers has under the prefix of its architecture, or itself."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return inner if isinstance(inner, nn.Module) else model


def find_sites(model: nn.Module, places: Sequence[Place]) -> list[Site]:
    """The places of these kinds in all layers, in the order of the model.

    Raises PlanError for a model without layers that have attention, and for a layer with several candidates or none.
    """
    layers = [(name, layer, _matrices(layer)) for name, layer in _numbered(trunk_of(model))]
    stacks = {_stack(name) for name, _, matrices in layers if any(_is_attention(own) for own, _ in matrices)}
    sites = [
        site
        for name, layer, matrices in layers
        if _stack(name) in stacks
        for site in _sites_of(name, layer, matrices)
        if site.place in places
    ]
    if not {*places} <= {site.place for site in sites}:
        name = type(model).__name__
        raise PlanError(f"{name} has no numbered layers with attention and a feed-forward part, expected some; {CURE}")
    return sites


def sizes_of(matrix: Any) -> tuple[int, int]:
    """The widths of a layer's inputs and outputs."""
    if isinstance(matrix, nn.Linear):
        return matrix.in_features, matrix.out_features
    inputs, outputs = matrix.weight.shape  # Conv1D of transformers
    return int(inputs), int(outputs)


def _numbered(trunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with a number for a name, but those inside of others."""
    for name, module in trunk.named_modules():
        *above, last = name.split(".")
        if last.isdecimal() and not any(part.isdecimal() for part in above):
            yield name, module


def _stack(name: str) -> str:
    return name.rpartition(".")[0]


def _matrices(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The matrices in a layer, with their names there, in the order in which they are defined."""
    return [
        (name, module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def _is_attention(name: str) -> bool:
    return ATTENTION in name.rpartition(".")[0].lower()


def _sites_of(name: str, layer: nn.Module, matrices: Sequence[tuple[str, nn.Module]]) -> Iterator[Site]:
    """The places of a layer. Raises PlanError if there may be several of one kind, or no feed-forward part."""
    if not matrices:
        return
    width = Counter(sizes_of(matrix)[0] for _, matrix in matrices).most_common(1)[0][0]
    attention = [(own, matrix) for own, matrix in matrices if _is_attention(own)]
    rest = [(own, matrix) for own, matrix in matrices if not _is_attention(own)]
    groups = {own.partition(".")[0] for own, _ in attention}
    down = [
        (own, matrix) for own, matrix in rest if sizes_of(matrix) != (width, width) and sizes_of(matrix)[1] == width
    ]
    if len(groups) > 1 or len(down) != 1:
        found = [own for own, _ in (attention if len(groups) > 1 else down)]
        raise PlanError(
            f"layer {name} has {', '.join(found) or 'no matrix'} where one attention and one matrix that ends a "
            f"feed-forward part were expected; {CURE}"
        )
    if attention:
        written = [matrix for _, matrix in attention if sizes_of(matrix)[1] == width]
        others = [matrix for _, matrix in attention if matrix is not written[-1]] if written else []
        if not others:
            raise PlanError(f"layer {name} has no matrix that ends its attention, expected one; {CURE}")
        yield Site(name, "attention", width, layer, others[0], written[-1])
    hidden = sizes_of(down[0][1])[0]
    up = [matrix for _, matrix in rest if sizes_of(matrix)[0] == width and sizes_of(matrix)[1] % hidden == 0]
    if not up:
        raise PlanError(f"layer {name} has no matrix that begins its feed-forward part, expected one; {CURE}")
    yield Site(name, "ffn", width, layer, up[0], down[0][1])
