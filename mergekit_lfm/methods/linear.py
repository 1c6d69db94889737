"""Weighted averages: model soups and their relatives. Everything else that merges elementwise starts from here."""

from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.sums import Weights, weighted_sum
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter, Unit, immediate

WEIGHT = Parameter("weight", REQUIRED, per_input=True, doc="relative weight of the input")


def normalise(weights: list[float], unit: Unit, switch: str | None = "normalize") -> list[float]:
    """weights divided by their sum. Weights that cancel to 1e-8 of their size are an error: the quotient has no digits.

    switch: the method's parameter that turns this off, or None.
    """
    total = sum(weights)
    if abs(total) <= 1e-8 * sum(map(abs, weights)):
        advice = f", or set `{switch}: false`" if switch else ""
        raise PlanError(
            f"{unit.name}: the weights {weights} sum to {total:g} and cannot be normalised; "
            f"give weights with another sum{advice}"
        )
    return [weight / total for weight in weights]


@immediate
def solve(unit: Unit) -> Weights:
    """The weights, normalised to sum 1 unless `normalize: false`."""
    weights = unit.floats("weight")
    return Weights(normalise(weights, unit) if unit.shared["normalize"] else weights)


METHODS = (
    Method(
        name="linear",
        source="Wortsman et al. 2022, Model soups, arXiv 2203.05482",
        summary="weighted average of all models",
        parameters=(
            WEIGHT,
            Parameter("normalize", True, per_input=False, kind="bool", doc="divide the weights by their sum"),
        ),
        base="member",
        inputs=(1, None),
        solve=solve,
        apply=weighted_sum,
    ),
)
