"""Optimal transport of units, layer after layer: fuse models of the same width, or of different widths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergekit_lfm.align.pair import Pair, Use, overflow
from mergekit_lfm.align.request import AlignProblem, AlignResult
from mergekit_lfm.arch.table import Units
from mergekit_lfm.artifacts.transform import Transform, TransformInfo, UnitsElement
from mergekit_lfm.errors import PlanError

WRITERS = ("", "order")  # the views of a group in the tensors that compute its units
ITERATIONS = 1_000_000  # the least limit for the network simplex; it needs far fewer than one per pair of units
TIE = 1e-9  # of the largest cost: a bonus that decides among plans that differ only by rounding
SINKHORN_ITERATIONS, SINKHORN_ERROR = 100_000, 1e-10  # the error of the marginals, which sum to 1

Squares = tuple[Tensor, Tensor, Tensor]  # of x [m, d] and y [n, d]: x y^T [m, n], |x|^2 [m], |y|^2 [n]


def transport_units(request: AlignProblem) -> AlignResult:
    """Transport each group by the optimal plan between the units of both models, given the groups before it.

    Layers are visited from the input on. The cost of a pair of units is the distance of the weight rows that write
    them, the source's already rewritten along the axes that they read, with biases as another column; or, with moments,
    the distance of their activations. With a plan T [m, n] of uniform marginals, the source's units are written through
    m T^T, a mean, and read through n T^T, a sum: to split a unit into equal ones, or to merge equal ones, keeps the
    outputs. If both models have m units, both are the T diag(1 / beta) of the paper. Heads stay as they are. Outputs
    and inputs of the model are never transported.

    The authors' code differs: it scales by n where m is meant, ignores biases, and by default transports the output
    layer. With different widths the paper scales readers by m, too. An exact plan between models of one width is a
    permutation, which keeps the outputs.

    Source: Singh and Jaggi 2020 (1910.05653), algorithm 1.
    """
    pair = request.pair
    groups = {name: group for name, group in pair.symmetries.groups.items() if isinstance(group, Units)}
    if request.moments is not None:
        request.moments.require(pair, groups)
    elements = {name: element for name, element in request.start.items() if name not in groups}
    transform = Transform(pair.symmetries, elements, TransformInfo("ot"))
    for name, uses in _visits(request, list(groups)):
        if request.moments is None:
            squares = _weights(pair, name, uses, transform)
        else:
            squares = _total(block.squares() for block in request.moments.of(pair, name))
        cost = cost_of(squares, str(request.options["cost"])).to(pair.device)
        if not cost.sum().isfinite():
            raise overflow(f"the products for the distances between the units of {name}")
        plan = solve(cost, request.number("regularisation"), name)
        elements[name] = _element(plan / plan.sum(1, keepdim=True), plan / plan.sum(0, keepdim=True))
        request.tick(1)
    heeded = {"initial": any(name not in groups for name in request.start), "order": request.moments is None}
    return AlignResult(
        pair,
        elements,
        exact=all(getattr(e, "matrix", None) is None for e in elements.values()),
        heeded=frozenset(name for name, matters in heeded.items() if matters),
    )


def _element(matrix: Tensor, dual: Tensor) -> UnitsElement:
    """The element that writes the units through matrix and reads them through dual; an order if these only permute."""
    permutes = matrix.shape[0] == matrix.shape[1] and bool(((matrix == 0) | (matrix == 1)).all())
    return UnitsElement(order=matrix.argmax(1)) if permutes else UnitsElement(matrix=matrix, dual=dual)


def _visits(request: AlignProblem, groups: list[str]) -> Iterable[tuple[str, Sequence[Use]]]:
    """Every group with the uses that write it and whose other axes are known. Raises PlanError for one without."""
    pair = request.pair
    if request.order is None or request.moments is not None:
        visits = list(pair.anchored(groups, WRITERS))
    else:
        names = list(request.order[0])
        left = [name for name in pair.symmetries.groups if name not in names]
        wider = [name for name in left if pair.symmetries.groups[name] != pair.to_symmetries.groups[name]]
        if len(request.order) > 1 or len({*names}) < len(names) or not {*names} <= {*groups} or wider:
            needed = f"; {', '.join(wider)} cannot be left out, because the widths differ" if wider else ""
            raise PlanError(
                f"found the order {'; '.join(', '.join(each) for each in request.order)}, expected one list of some of "
                f"{', '.join(groups)}, each once at most{needed}"
            )
        visits = [(n, pair.known_uses(pair.uses(n, WRITERS), [*left, *names[:i]])) for i, n in enumerate(names)]
    unknown = [name for name, uses in visits if not uses and pair.uses(name)]
    if unknown and request.moments is None:
        raise PlanError(
            f"{', '.join(unknown)} comes before the groups that its weights read; expected a group's inputs to be "
            "transported before it. Visit the groups from the input on"
        )
    return [(name, uses) for name, uses in visits if pair.uses(name)]


def _weights(pair: Pair, group: str, uses: Sequence[Use], transform: Transform) -> Squares:
    """The products of both models' rows, over all weights that write the group."""

    def of(use: Use) -> list[Squares]:
        return [_products(x.double(), y.double()) for _, x, y in pair.unfolded(use, group, transform, WRITERS)]

    return _total(squares for each in pair.in_order(of, uses) for squares in each)


def _products(x: Tensor, y: Tensor) -> Squares:
    return x @ y.T, x.square().sum(1), y.square().sum(1)


def _total(parts: Iterable[Squares]) -> Squares:
    inner, first, second = zip(*parts, strict=True)
    return sum(inner[1:], inner[0]), sum(first[1:], first[0]), sum(second[1:], second[0])


def cost_of(squares: Squares, metric: str) -> Tensor:
    """The distance between every x and y, float64 [m, n]: "euclidean", "squared", or "cosine" (1 - the cosine)."""
    inner, first, second = squares
    if metric == "cosine":
        lengths = first.sqrt()[:, None] * second.sqrt()
        return 1 - torch.where(lengths > 0, inner / torch.where(lengths > 0, lengths, 1.0), 0.0)
    apart = (first[:, None] + second - 2 * inner).clamp(min=0)
    return apart.sqrt() if metric == "euclidean" else apart


def solve(cost: Tensor, regularisation: float, name: str, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """The plan [m, n], >= 0 with equal row sums and equal column sums, with the least <cost, plan>.

    regularisation: the weight of the entropy, as a factor of the largest cost; 0 for the exact plan. Exact plans are
    whole numbers times 1 / (m n), and returned as these whole numbers. Among equally good plans with m = n the one that
    moves the fewest units wins; if all costs are 0, none moves. Sinkhorn's iteration runs on the cost's device, the
    exact solver on the CPU, where the plan lies. Raises PlanError if the iteration does not converge.
    """
    import ot

    m, n = cost.shape
    if regularisation == 0:
        cost = cost.cpu()
        _, exponent = math.frexp(float(cost.max()))
        cost = cost * 2.0**-exponent  # POT's solver compares costs with constants; a power of two keeps their digits
        if m == n:
            cost = cost - (TIE * float(cost.max()) or 1.0) * torch.eye(n, dtype=torch.float64)
        first, second = torch.full((m,), float(n), dtype=torch.float64), torch.full((n,), float(m), dtype=torch.float64)
        most = max(ITERATIONS, 100 * m * n)
        plan, log = ot.emd(first.numpy(), second.numpy(), cost.numpy(), numItermax=most, log=True)
        assert log["warning"] is None, log["warning"]
        return torch.from_numpy(plan)
    first, second = cost.new_full((m,), 1 / m), cost.new_full((n,), 1 / n)
    largest = float(cost.max())
    if largest == 0 and m == n:
        return torch.eye(n, dtype=torch.float64) / n
    scaled = cost / largest if largest > 0 else cost
    plan, log = ot.bregman.sinkhorn_log(
        first,
        second,
        scaled,
        regularisation,
        numItermax=iterations,
        stopThr=SINKHORN_ERROR,
        log=True,
        warn=False,
    )
    if not log["err"] or float(log["err"][-1]) > SINKHORN_ERROR:
        raise PlanError(
            f"Sinkhorn's iteration for {name} has not converged after {iterations} steps with regularisation "
            f"{regularisation:g}; expected marginals to {SINKHORN_ERROR:g}. Raise it, or set it to 0 for the exact plan"
        )
    return torch.as_tensor(plan).cpu()
