"""Bottleneck adapters as modules: each takes states, and gives what is added to what a part of a layer adds.

One row of `FORMS` for each form. All begin with 0, so that a new one changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError

Config = Mapping[str, Any]
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": nn.functional.gelu}


class Bottleneck(nn.Module):
    """scale * (U f(D x + a) + b), with D [size, width] and U [width, size].

    Source: Houlsby et al. 2019, arXiv 1902.00751, figure 2; the scale is of He et al. 2021, arXiv 2110.04366, table 2.
    They begin with a small U, or with 0 as here.
    """

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, config["size"]), nn.Linear(config["size"], width)
        for x in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(x)
        self.activation, self.scale = ACTIVATIONS[config["activation"]], float(config["scale"])

    def forward(self, states: Tensor) -> Tensor:
        """The change that is added, of states [..., width]."""
        change: Tensor = self.scale * self.up(self.activation(self.down(states)))
        return change


class Rules(nn.Module):
    """The slow weights of Compacter: the left factors of all Kronecker products of a model, [rules, rules, rules]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        rules = config["rules"]
        self.left = nn.Parameter(torch.empty(rules, rules, rules).normal_(std=1 / rules))


class Compact(nn.Module):
    """A bottleneck whose matrices are sums of Kronecker products, of factors that layers share and those of low rank.

    Source: Karimi Mahabadi et al. 2021, arXiv 2106.04647, equations 4 to 6. The last factor of U begins with 0, theirs
    is drawn.
    """

    def __init__(self, config: Config, width: int, rules: Rules) -> None:
        super().__init__()
        count, rank, size = config["rules"], config["factor_rank"], config["size"]
        if width % count or size % count:
            raise PlanError(
                f"rules is {count}; expected a divisor of the width {width} and of size {size}. Choose another"
            )
        self._rules = (rules,)  # not a part of each layer's module
        self.down_s = nn.Parameter(torch.empty(count, width // count, rank).normal_(std=(width / count) ** -0.5))
        self.down_t = nn.Parameter(torch.empty(count, rank, size // count).normal_(std=rank**-0.5))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up_s = nn.Parameter(torch.empty(count, size // count, rank).normal_(std=(size / count) ** -0.5))
        self.up_t = nn.Parameter(torch.zeros(count, rank, width // count))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.activation, self.scale = ACTIVATIONS[config["activation"]], float(config["scale"])

    def matrices(self) -> tuple[Tensor, Tensor]:
        """D and U in full, [size, width] and [width, size]."""
        left = self._rules[0].left
        return kronecker_sum(left, self.down_s @ self.down_t).T, kronecker_sum(left, self.up_s @ self.up_t).T

    def forward(self, states: Tensor) -> Tensor:
        """The change that is added, of states [..., width]."""
        down, up = self.matrices()
        inner = self.activation(nn.functional.linear(states, down, self.down_bias))
        return self.scale * nn.functional.linear(inner, up, self.up_bias)

    def expanded(self) -> dict[str, Tensor]:
        """The tensors of the `Bottleneck` that does the same."""
        down, up = (x.detach().contiguous() for x in self.matrices())
        biases = {"down.bias": self.down_bias.detach(), "up.bias": self.up_bias.detach()}
        return {"down.weight": down, "up.weight": up, **biases}


def kronecker_sum(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the Kronecker products of left [n, a, b] and right [n, c, d], [a * c, b * d]."""
    whole = torch.einsum("nab,ncd->acbd", left, right)
    return whole.reshape(left.shape[1] * right.shape[1], left.shape[2] * right.shape[2])


class Mixture(nn.Module):
    """Several bottlenecks: in training one D and one U of them, drawn at random for each pass; else their average.

    All layers choose by themselves. Source: Wang et al. 2022, arXiv 2205.12410, sections 3.1 and 3.3.
    """

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Bottleneck(config, width) for _ in range(config["experts"]))
        self.activation, self.scale = ACTIVATIONS[config["activation"]], float(config["scale"])

    def forward(self, states: Tensor) -> Tensor:
        """The change that is added, of states [..., width]."""
        if self.training:
            first, second = torch.randint(len(self.experts), (2,)).tolist()
            down, up = self.experts[first].down, self.experts[second].up
            change: Tensor = self.scale * up(self.activation(down(states)))
            return change
        mean = self.averaged()
        inner = self.activation(nn.functional.linear(states, mean["down.weight"], mean["down.bias"]))
        return self.scale * nn.functional.linear(inner, mean["up.weight"], mean["up.bias"])

    def averaged(self) -> dict[str, Tensor]:
        """The tensors of the `Bottleneck` that is the mean of all."""
        states = [dict(expert.named_parameters()) for expert in self.experts]
        return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


class Fusion(nn.Module):
    """Bottlenecks of other tasks, which stay, weighed for each token by attention: sum of softmax(Qx . K a_i) V a_i.

    a_i: what adapter i adds at the states x. V begins with the identity, and Q with 0, so that it begins with the mean.
    Source: Pfeiffer et al. 2020, arXiv 2005.00247, equations 2 to 4.
    """

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Bottleneck(each, width) for each in config["adapters"])
        self.query, self.key, self.value = (nn.Linear(width, width, bias=biased) for biased in (True, True, False))
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)
        nn.init.eye_(self.value.weight)

    def forward(self, states: Tensor) -> Tensor:
        """The change that is added, of states [..., width]."""
        found = torch.stack([adapter(states) for adapter in self.adapters], -2)  # [..., adapters, width]
        scores = (self.key(found) @ self.query(states)[..., None])[..., 0]
        mixed: Tensor = (scores.softmax(-1)[..., None] * self.value(found)).sum(-2)
        return mixed


def join(module: nn.Module, reads: nn.Module, writes: nn.Module, *, beside: bool) -> list[Any]:
    """Have a module's result added to what a part of a layer writes: of that, or beside it of what the part reads."""
    read: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read["states"] = inputs[0]

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        change: Tensor = module(read.pop("states") if beside else output)
        return output + change

    handles: list[Any] = [reads.register_forward_pre_hook(keep)] if beside else []
    return [*handles, writes.register_forward_hook(add)]


def _alone(form: Callable[[Config, int], nn.Module]) -> Callable[[Config, int, nn.Module | None], nn.Module]:
    return lambda config, width, _: form(config, width)


def _compact(config: Config, width: int, rules: nn.Module | None) -> nn.Module:
    assert isinstance(rules, Rules)
    return Compact(config, width, rules)


@dataclass(frozen=True, slots=True)
class Form:
    """A form of modules. build: one for a width, and what all share; shared: makes that."""

    build: Callable[[Config, int, nn.Module | None], nn.Module]
    shared: Callable[[Config], nn.Module] | None = None


FORMS: Mapping[str, Form] = {
    "bottleneck": Form(_alone(Bottleneck)),
    "compact": Form(_compact, Rules),
    "mixture": Form(_alone(Mixture)),  # in trainings alone: its average is saved
    "fusion": Form(_alone(Fusion)),
}
