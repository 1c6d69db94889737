"""ExPO: go on in the direction in which training went."""

from mergekit_lfm.kernels.sums import Weights, weighted_sum
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter, Unit, immediate


@immediate
def solve(unit: Unit) -> Weights:
    """base + (1 + alpha) delta = model + alpha (model - base)."""
    return Weights([1.0 + unit.number("alpha")])


METHODS = (
    Method(
        name="expo",
        source="Zheng et al. 2024, Model extrapolation expedites alignment (ExPO), arXiv 2404.16792",
        summary="a model, moved further away from its base",
        parameters=(
            Parameter("alpha", REQUIRED, per_input=False, doc="how much further, in lengths of the delta; 0.1 to 0.5"),
        ),
        base="required",
        inputs=(1, 1),
        solve=solve,
        apply=weighted_sum,
    ),
)
