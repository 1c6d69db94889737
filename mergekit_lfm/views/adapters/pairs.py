"""The pairs of matrices of an adapter whose changes are their products, by what they change. Its own headers suffice.

Adapters are merged among themselves where each change is scale B A. The change of another kind depends on the model's
weights, or is not a sum of products; such an adapter is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mergekit_lfm.artifacts.adapter import Adapter, Module
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.adapters.experts import parameters_of
from mergekit_lfm.views.adapters.find import all_strange_parts, refuse_kind, strange_keys
from mergekit_lfm.views.adapters.finding import Finding
from mergekit_lfm.views.adapters.kinds import find_halves
from mergekit_lfm.views.adapters.names import has_underscores, is_experts

APPLY = "apply it to its model as `model: BASE+ADAPTER`, and merge the models"
# Parts of a module that are not of a product, and their names in messages.
OTHERS = {
    "lora_magnitude_vector": "DoRA, whose change depends on the model's weights",
    "trainable_tokens_delta": "rows of trained tokens",
    "lora_B.bias": "a bias of lora_B",
}


@dataclass(frozen=True, slots=True)
class Form:
    """The shape of a change: B's rows, and A's axes but for the rank; whether it is an embedding's.

    experts: their number, for a tensor of all experts of a layer; else 0.
    """

    out: int
    columns: tuple[int, ...]
    embedding: bool = False
    experts: int = 0

    @property
    def width(self) -> int:
        """The numbers in a row."""
        return prod(self.columns)

    def __str__(self) -> str:
        own = [self.out, *self.columns]
        shape = str([self.experts, *own] if self.experts else own)
        return f"{shape} as an embedding" if self.embedding else shape


@dataclass(frozen=True, slots=True)
class Pair:
    """One change: scale B A, in the form that A and B have; of experts PEFT's A and B of all of them."""

    a: TensorSpec
    b: TensorSpec
    scale: float
    form: Form

    @property
    def rank(self) -> int:
        return self.a.shape[0] // max(1, self.form.experts)


def find_pairs(adapter: Adapter, share: float) -> dict[str, Pair]:
    """By the module, or the tensor of all experts, that an adapter changes the pair. share: of what it does.

    Raises PlanError with all that is something else than a product, or does not fit the config.
    """
    refuse_kind(adapter)
    if adapter.kind != "LORA":
        raise PlanError(
            f"{adapter.label} is {adapter.kind}, expected LORA, whose changes are products of matrices: {APPLY}"
        )
    finding = Finding(adapter, {}, "", {})
    others = [
        f"{module.name} has {why}" for module in adapter.modules for part, why in OTHERS.items() if part in module.parts
    ]
    if adapter.config.get("use_dora") and not others:
        others = [f"its config has use_dora: {OTHERS['lora_magnitude_vector']}"]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        finding.problems.append(f"{others[0]}{more}, expected a LoRA, whose changes are products of matrices: {APPLY}")
    if has_underscores(module.name for module in adapter.modules):
        text = "its names have underscores for dots, and only a model says which: "
        finding.problems.append(text + APPLY)
    finding.problems += [*strange_keys(adapter), *all_strange_parts(adapter)]
    pairs = dict(_all_pairs(finding, share))
    if finding.problems:
        problems = [f"{adapter.label}: {problem}" for problem in dict.fromkeys(finding.problems)]
        raise PlanError(several(f"{adapter.label} cannot be merged with other adapters", problems, most=10))
    return pairs


def _all_pairs(finding: Finding, share: float) -> Iterator[tuple[str, Pair]]:
    experts: dict[str, list[Module]] = {}
    for module in finding.adapter.modules:
        if is_experts(module):
            experts.setdefault(module.name, []).append(module)
            continue
        halves = find_halves(finding, module)
        if halves is None:
            continue
        a, b = halves
        if b.numel != b.shape[0] * a.shape[0]:
            finding.refuse(module, f"A {list(a.shape)} and B {list(b.shape)} are of other ranks; save the adapter anew")
            continue
        scale = finding.scale(module, module.name, finding.rank(module, module.name, a.shape[0]))
        form = Form(b.shape[0], a.shape[1:], "lora_embedding_A" in module.parts)
        yield module.name, Pair(a, b, share * scale, form)
    for name, modules in experts.items():
        yield from _expert_pairs(finding, name, modules, share)


def _expert_pairs(finding: Finding, name: str, modules: list[Module], share: float) -> Iterator[tuple[str, Pair]]:
    """The pairs of one layer's experts. Their number follows from the rank that the config has."""
    modules.sort(key=lambda module: -module.depth)
    parameters = parameters_of(finding.adapter, name)
    if len(parameters) != len(modules):
        found = ", ".join(parameters) or "none"
        finding.refuse(modules[0], f"it has {len(modules)} pairs of matrices, and target_parameters names {found}")
        return
    for module, parameter in zip(modules, parameters, strict=True):
        halves = find_halves(finding, module)
        if halves is None:
            continue
        a, b = halves
        own = f"{name}.{parameter}"
        rank = finding.stated_rank(own)
        if not isinstance(rank, int) or rank < 1 or a.shape[0] % rank or b.shape[1:] != a.shape[:1]:
            finding.refuse(module, f"{parameter}: A {list(a.shape)} and B {list(b.shape)} are of no rank {rank}")
            continue
        form = Form(b.shape[0], a.shape[1:], experts=a.shape[0] // rank)
        yield own, Pair(a, b, share * finding.scale(module, own, rank), form)
