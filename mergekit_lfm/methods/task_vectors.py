"""Task arithmetic and its sparse relatives: TIES, DARE, Breadcrumbs, DELLA.

All are one formula, base + lambda * combine(weight_i * scale_i * mask_i * delta_i). They differ in which entries of a
delta are kept, in how the kept are scaled, and in whether the signs are put to a vote before summing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.bits import apply_mask, flip_signs, negative
from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.random import Coins, LocalCoins, LocalRankedCoins, RankedCoins
from mergekit_lfm.kernels.ranks import NONE, LocalRanks, Ranks, largest
from mergekit_lfm.kernels.reductions import L1, Reduction, SignBalance
from mergekit_lfm.kernels.sums import add_base, add_up
from mergekit_lfm.methods.linear import WEIGHT, normalise
from mergekit_lfm.methods.method import Method, Parameter, Unit, Value

if TYPE_CHECKING:
    import torch

Kept = Ranks | Coins | RankedCoins
Sparsify = Callable[[Unit], Generator[Reduction, Any, Kept | None]]


class LocalSum(NamedTuple):
    """A sum's coefficients for one block; factors, votes [n] and lambda_ are tensors."""

    factors: torch.Tensor
    mask: LocalRanks | LocalCoins | LocalRankedCoins | None
    votes: torch.Tensor | None
    normalize: bool
    lambda_: torch.Tensor
    zero_is_positive: bool


@dataclass(frozen=True)
class SparseSum:
    """Coefficients of the merge. factors: weight times rescaling; votes: the weights alone, None for no vote.

    zero_is_positive: True if an element whose sum is exactly zero votes for plus.
    """

    factors: Sequence[float]
    mask: Kept | None
    votes: Sequence[float] | None
    normalize: bool
    lambda_: float
    zero_is_positive: bool = True

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalSum:
        """The same for the block of `count` elements from index `start`."""
        return LocalSum(
            factors=constant(tuple(self.factors), dtype),
            mask=None if self.mask is None else self.mask.at(start, count, dtype),
            votes=None if self.votes is None else constant(tuple(self.votes), dtype),
            normalize=self.normalize,
            lambda_=constant(self.lambda_, dtype),
            zero_is_positive=self.zero_is_positive,
        )


def apply(rows: Rows, base: torch.Tensor | None, c: LocalSum) -> torch.Tensor:
    """base + lambda * sum of the kept terms; with votes, the mean of those that agree with the elected sign."""
    terms = [x * c.factors[i] for i, x in enumerate(rows)]
    if c.mask is not None:
        terms = [apply_mask(term, c.mask.mask(i, rows[i])) for i, term in enumerate(terms)]
    total = add_up(terms)
    if c.votes is not None:
        total = sum_agreeing(terms, total, c.votes, c.normalize, c.zero_is_positive)
    return add_base(total * c.lambda_, base)


def sum_agreeing(
    terms: Rows, total: torch.Tensor, votes: torch.Tensor, normalize: bool, zero_is_positive: bool
) -> torch.Tensor:
    """The sum of the terms that agree in sign with the total, divided by the sum of their weights if `normalize`.

    Terms are flipped so that those that agree are positive. A total of zero votes as `zero_is_positive` says.
    """
    if not zero_is_positive:
        total = total - (1 - total.sign().abs())  # -1 in place of zero
    elected = negative(total)
    agreeing = [flip_signs(term, elected).clamp(min=0) for term in terms]
    agreeing[0] = agreeing[0] + 0.0  # the greater of -0 and 0 is another on every device
    merged = add_up(agreeing)
    if normalize:
        weight = agreeing[0].sign() * votes[0]
        for i in range(1, len(agreeing)):
            weight += agreeing[i].sign() * votes[i]
        merged = merged / (weight + (1 - weight.sign().abs()))  # 0 / 1 where no term agrees
    return flip_signs(merged, elected)


def _everything(_: Unit) -> Generator[Reduction, Any, None]:
    return None
    yield  # asks for nothing


def _largest(unit: Unit) -> Generator[Reduction, Any, Kept | None]:
    """Keep the fraction `density` of every delta's largest entries, at least one."""
    if unit.shared["scope"] == "global":
        counts = [min(unit.numel, int(d * unit.numel) + 1) for d in unit.floats("density")]
    else:
        counts = [max(1, int(d * unit.numel)) for d in unit.floats("density")]
    if all(k >= unit.numel for k in counts):
        return None
    kept = yield from largest(
        unit.numel, [[k] for k in counts], double=unit.double, exact=unit.shared["scope"] != "global"
    )
    return Ranks(tuple((outer, NONE) for (outer,) in kept))


def _coins(unit: Unit) -> Generator[Reduction, Any, Kept | None]:
    """Keep every entry with probability `density`."""
    densities = unit.floats("density")
    return None if all(d >= 1 for d in densities) else Coins(unit.keys, tuple(densities))
    yield  # asks for nothing


def _coins_by_rank(unit: Unit) -> Generator[Reduction, Any, Kept | None]:
    """Keep entries with probabilities from density - epsilon, for a row's smallest, to density + epsilon."""
    ends = []
    for density, epsilon in zip(unit.floats("density"), unit.floats("epsilon"), strict=True):
        low, high = (density - epsilon, density + epsilon) if density < 1 else (1.0, 1.0)
        if density < 1 and not 0 < low <= high < 1:
            raise PlanError(
                f"{unit.name}: density {density:g} and epsilon {epsilon:g} give probabilities from {low:g} to "
                f"{high:g}, which have to lie between 0 and 1: choose an epsilon below {min(density, 1 - density):g}"
            )
        ends.append((low, high))
    return None if all(low >= 1 for low, _ in ends) else RankedCoins(unit.keys, ends, _last_axis(unit))
    yield  # asks for nothing


def _last_axis(unit: Unit) -> int:
    """Elements of a row; a vector is one row."""
    return unit.shape[-1] if unit.shape else 1


def _even_rows(unit: Unit) -> int | None:
    """Elements of blocks of whole rows; two rows if they are odd, because coins come in pairs."""
    row = _last_axis(unit)
    return row * (1 + row % 2) if unit.numel else None


def _middle(unit: Unit) -> Generator[Reduction, Any, Kept | None]:
    """Drop the fraction `gamma` of largest entries, keep the fraction `density` of largest ones among the rest."""
    counts = []
    for density, gamma in zip(unit.floats("density"), unit.floats("gamma"), strict=True):
        target = int(density * unit.numel)
        below = max(0, unit.numel - target - int(gamma * unit.numel))
        whole = density >= 1
        counts.append([unit.numel, 0] if whole else [unit.numel - below, unit.numel - below - target])
    if all(outer >= unit.numel and inner <= 0 for outer, inner in counts):
        return None
    kept = yield from largest(unit.numel, counts, double=unit.double)
    return Ranks(tuple((outer, inner) for outer, inner in kept))


def _scales(unit: Unit, mask: Kept | None) -> Generator[Reduction, Any, list[float]]:
    """The factors of the kept entries: 1, the ratio of L1 norms, or one over the density."""
    if mask is None or not unit.shared["rescale"]:
        return [1.0] * len(unit.inputs)
    if unit.shared["rescale"] == "density":
        return [1.0 / d for d in unit.floats("density")]
    sums = yield L1(mask)
    return [before / after if after else 1.0 for before, after in sums.tolist()]


def _solve(sparsify: Sparsify, vote: bool) -> Callable[[Unit], Generator[Reduction, Any, SparseSum]]:
    def solve(unit: Unit) -> Generator[Reduction, Any, SparseSum]:
        weights, normalize, lambda_ = unit.floats("weight"), bool(unit.shared["normalize"]), unit.number("lambda")
        if not vote:
            weights = [lambda_ * w for w in (normalise(weights, unit) if normalize else weights)]
        mask = yield from sparsify(unit)
        scales = yield from _scales(unit, mask)
        factors = tuple(w * s for w, s in zip(weights, scales, strict=True))
        if not vote:
            return SparseSum(factors, mask, votes=None, normalize=False, lambda_=1.0)
        positive = True
        if unit.shared.get("scope") == "global":
            positive = int((yield SignBalance(factors, mask))) > 0
        return SparseSum(factors, mask, tuple(weights), normalize, lambda_, positive)

    return solve


DENSITY = Parameter("density", 1.0, per_input=True, above=0, maximum=1, doc="fraction of a delta's entries to keep")
GAMMA = Parameter(
    "gamma", 0.01, per_input=True, minimum=0, maximum=1, doc="fraction of a delta's largest entries to drop"
)
EPSILON = Parameter(
    "epsilon",
    0.15,
    per_input=True,
    minimum=0,
    doc="a row's smallest entry is kept with probability density - epsilon, its largest with density + epsilon",
)
SCOPE = Parameter(
    "scope",
    "tensor",
    per_input=False,
    kind="str",
    choices=("tensor", "global"),
    doc="one threshold per tensor, or one over the whole model as in the paper (keeps ties at the threshold)",
)


def scope_of(shared: Mapping[str, Value]) -> str:
    """The scope of a method that has the parameter SCOPE."""
    return "model" if shared["scope"] == "global" else "tensor"


LAMBDA = Parameter("lambda", 1.0, per_input=False, doc="factor of the merged delta")


def _shared(normalize: bool, rescale: bool | None) -> tuple[Parameter, ...]:
    switch = Parameter(
        "rescale",
        bool(rescale),
        per_input=False,
        kind="switch",
        choices=("l1", "density"),
        doc='true or "l1": restore each delta\'s L1 norm; "density": divide by the density, as the DARE paper does',
    )
    return (
        Parameter("normalize", normalize, per_input=False, kind="bool", doc="divide by the sum of the weights"),
        LAMBDA,
        *(() if rescale is None else (switch,)),
    )


def _method(
    name: str, source: str, summary: str, sparsify: Sparsify, parameters: tuple[Parameter, ...], **more: Any
) -> Method:
    vote = name in {"ties", "dare_ties", "breadcrumbs_ties", "della"}
    return Method(
        name=name,
        source=source,
        summary=summary,
        parameters=(WEIGHT, *parameters),
        base="required",
        inputs=(1, None),
        solve=_solve(sparsify, vote),
        apply=apply,
        **more,
    )


TIES = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
DARE = "Yu et al. 2024, Language models are Super Mario, arXiv 2311.03099"
DELLA = "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617"
CRUMBS = "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795"

METHODS = (
    _method(
        "task_arithmetic",
        "Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089",
        "base plus the weighted sum of the deltas",
        _everything,
        _shared(False, None),
    ),
    _method(
        "ties",
        TIES,
        "the largest entries of each delta, signs elected by weighted mass, mean of those that agree",
        _largest,
        (DENSITY, *_shared(True, False), SCOPE),
        scope=scope_of,
        version=3,
    ),
    _method(
        "dare_linear",
        DARE,
        "random entries of each delta, summed",
        _coins,
        (DENSITY, *_shared(False, True)),
        random=True,
        version=2,
    ),
    _method(
        "dare_ties",
        f"{DARE}; {TIES}",
        "random entries, then TIES",
        _coins,
        (DENSITY, *_shared(False, True)),
        random=True,
        version=3,
    ),
    _method(
        "breadcrumbs",
        CRUMBS,
        "each delta without its largest and its smallest entries, summed",
        _middle,
        (DENSITY, GAMMA, *_shared(False, False)),
        version=2,
    ),
    _method(
        "breadcrumbs_ties",
        f"{CRUMBS}; {TIES}",
        "without the largest and the smallest entries, then TIES",
        _middle,
        (DENSITY, GAMMA, *_shared(False, False)),
        version=3,
    ),
    _method(
        "della",
        f"{DELLA}; {TIES}",
        "random entries of each delta, larger ones of a row more often, then TIES",
        _coins_by_rank,
        (DENSITY, EPSILON, *_shared(True, True)),
        random=True,
        row=_even_rows,
    ),
    _method(
        "della_linear",
        DELLA,
        "random entries of each delta, larger ones of a row more often, summed",
        _coins_by_rank,
        (DENSITY, EPSILON, *_shared(False, True)),
        random=True,
        row=_even_rows,
    ),
)
