"""Optimal transport of units, layer after layer: the fusion of models of one width, or of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergekit_lfm.align.pair import Pair, Use, overflow
from mergekit_lfm.align.request import Found, Request
from mergekit_lfm.arch.table import Units
from mergekit_lfm.artifacts.transform import Transform, TransformFacts, UnitsElement
from mergekit_lfm.errors import PlanError

WRITERS = ("", "order")  # views of a group along which its units are computed
ITERATIONS = 1_000_000  # of the network simplex, at least; it takes far fewer than one per pair of units
TIE = 1e-9  # of the largest cost: what decides among plans that are equally good but for rounding
SINKHORN_ITERATIONS, SINKHORN_ERROR = 100_000, 1e-10  # the error of the marginals, of which the sum is 1

Squares = tuple[Tensor, Tensor, Tensor]  # of x [m, d] and y [n, d]: x y^T [m, n], |x|^2 [m], |y|^2 [n]


def transport_units(request: Request) -> Found:
    """Each group by the optimal plan between the units of both models, given the groups before it.

    Layers are visited from the input on. The cost of a pair of units is the distance of what they are computed by: the
    rows of weights that write them, those of the source already rewritten along the axes that they read, and biases as
    another column; or, with moments, the distance of their activations. With a plan T [m, n] of uniform marginals, a
    unit of the source is written as m T^T says, a mean, and read as n T^T says, a sum: a unit that is split into equal
    ones, or merged from such, leaves the outputs as they are. Where both models have m units, both are the T diag(1 /
    beta) of the paper. Heads stay as they are. Outputs and inputs of the model are never transported.

    The authors' code differs: it scales by n where m is meant, knows no biases, and transports the output layer unless
    told otherwise. With widths that differ the paper scales readers by m, too. An exact plan between models of one
    width is a permutation, which leaves the outputs as they are.

    Source: Singh and Jaggi 2020 (1910.05653), algorithm 1.
    """
    pair = request.pair
    groups = {name: group for name, group in pair.symmetries.groups.items() if isinstance(group, Units)}
    if request.moments is not None:
        request.moments.require(pair, groups)
    elements = {name: element for name, element in request.start.items() if name not in groups}
    transform = Transform(pair.symmetries, elements, TransformFacts("ot"))
    for name, uses in _visits(request, list(groups)):
        if request.moments is None:
            squares = _weights(pair, name, uses, transform)
        else:
            squares = _total(block.squares() for block in request.moments.of(pair, name))
        cost = cost_of(squares, str(request.options["cost"])).to(pair.device)
        if not cost.sum().isfinite():
            raise overflow(f"the products that tell the units of {name} apart")
        plan = solve(cost, request.number("regularisation"), name)
        elements[name] = _element(plan / plan.sum(1, keepdim=True), plan / plan.sum(0, keepdim=True))
        request.tick(1)
    heeded = {"initial": any(name not in groups for name in request.start), "order": request.moments is None}
    return Found(
        pair,
        elements,
        exact=all(getattr(e, "matrix", None) is None for e in elements.values()),
        heeded=frozenset(name for name, matters in heeded.items() if matters),
    )


def _element(matrix: Tensor, dual: Tensor) -> UnitsElement:
    """What writes and reads the units as these say: where they only permute them, as an order."""
    permutes = matrix.shape[0] == matrix.shape[1] and bool(((matrix == 0) | (matrix == 1)).all())
    return UnitsElement(order=matrix.argmax(1)) if permutes else UnitsElement(matrix=matrix, dual=dual)


def _visits(request: Request, groups: list[str]) -> Iterable[tuple[str, Sequence[Use]]]:
    """Every group with the uses that write it, when their other axes are known. PlanError where there are none."""
    pair = request.pair
    if request.order is None or request.moments is not None:
        visits = list(pair.anchored(groups, WRITERS))
    else:
        names = list(request.order[0])
        left = [name for name in pair.symmetries.groups if name not in names]
        wider = [name for name in left if pair.symmetries.groups[name] != pair.to_symmetries.groups[name]]
        if len(request.order) > 1 or len({*names}) < len(names) or not {*names} <= {*groups} or wider:
            of_units = f"; {', '.join(wider)} cannot be left out, as the widths differ" if wider else ""
            raise PlanError(
                f"found the order {'; '.join(', '.join(each) for each in request.order)}, expected one list of some of "
                f"{', '.join(groups)}, each once at most{of_units}"
            )
        visits = [(n, pair.known_uses(pair.uses(n, WRITERS), [*left, *names[:i]])) for i, n in enumerate(names)]
    unknown = [name for name, uses in visits if not uses and pair.uses(name)]
    if unknown and request.moments is None:
        raise PlanError(
            f"nothing is known of what writes {', '.join(unknown)} when it is visited; expected a group's inputs to be "
            "transported before it. Visit the groups from the input on"
        )
    return [(name, uses) for name, uses in visits if pair.uses(name)]


def _weights(pair: Pair, group: str, uses: Sequence[Use], transform: Transform) -> Squares:
    """The products of both models' rows of all weights that write the group."""

    def of(use: Use) -> list[Squares]:
        return [_products(x.double(), y.double()) for _, x, y in pair.unfolded(use, group, transform, WRITERS)]

    return _total(squares for found in pair.in_order(of, uses) for squares in found)


def _products(x: Tensor, y: Tensor) -> Squares:
    return x @ y.T, x.square().sum(1), y.square().sum(1)


def _total(parts: Iterable[Squares]) -> Squares:
    inner, first, second = zip(*parts, strict=True)
    return sum(inner[1:], inner[0]), sum(first[1:], first[0]), sum(second[1:], second[0])


def cost_of(squares: Squares, metric: str) -> Tensor:
    """The distance of every x and y, float64 [m, n]: "euclidean", "squared", or "cosine" (1 - the cosine)."""
    inner, first, second = squares
    if metric == "cosine":
        lengths = first.sqrt()[:, None] * second.sqrt()
        return 1 - torch.where(lengths > 0, inner / torch.where(lengths > 0, lengths, 1.0), 0.0)
    apart = (first[:, None] + second - 2 * inner).clamp(min=0)
    return apart.sqrt() if metric == "euclidean" else apart


def solve(cost: Tensor, regularisation: float, name: str, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """The plan [m, n], at least 0, of rows and columns of equal sums, of which <cost, plan> is least.

    regularisation: of the entropy, as a factor of the largest cost; 0 for the exact plan. Exact plans are whole numbers
    times 1 / (m n), and are returned as these. Of several that are best, with m = n, the one that leaves most units in
    their places, and where all costs are 0 all of them. Sinkhorn's iteration runs where the cost lies, the exact solver
    on the CPU, where the plan is. PlanError where the iteration does not converge.
    """
    import ot

    m, n = cost.shape
    if regularisation == 0:
        cost = cost.cpu()
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
