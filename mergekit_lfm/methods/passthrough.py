"""The only input itself, byte for byte, or times a scale."""

from mergekit_lfm.kernels.sums import Weights, weighted_sum
from mergekit_lfm.methods.method import Method, Parameter, Unit, immediate


@immediate
def solve(unit: Unit) -> Weights:
    """The scale; by default 1."""
    scale = unit.inputs[0]["scale"]
    return Weights([1.0 if scale is None else float(scale)])


METHODS = (
    Method(
        name="passthrough",
        source="none: a copy",
        summary="one model, copied; `scale` multiplies the tensors that it is given for",
        parameters=(Parameter("scale", None, per_input=True, doc="factor; without it the bytes are copied"),),
        base="member",
        inputs=(1, 1),
        solve=solve,
        apply=weighted_sum,
        copies=lambda unit: unit.inputs[0]["scale"] is None,
    ),
)
