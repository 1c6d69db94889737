"""Methods of alignment with their parameters, and checked requests for an alignment. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.methods.method import Parameter, Value
from mergekit_lfm.recipe.values import NamedFile, read_value


@dataclass(frozen=True, slots=True)
class AlignRequest:
    """A request to align a model to another, whose label in the recipe is `to`. options: all of the method's."""

    to: str
    method: str
    options: tuple[tuple[str, Value], ...]
    stats: NamedFile | None = None

    def as_data(self) -> dict[str, Any]:
        """The request as in a recipe."""
        stats = {} if self.stats is None else {"stats": self.stats.ref}
        return {"to": self.to, "method": self.method, **dict(self.options), **stats}


@dataclass(frozen=True, slots=True)
class AlignMethod:
    """One way to align a model to another. statistics: whether it reads cross moments of both on the same data.

    idle: parameters without effect when it does. starts: True if its result depends on an initial transform.
    """

    name: str
    doc: str
    source: str
    statistics: Literal["no", "optional", "required"]
    parameters: tuple[Parameter, ...] = ()
    idle: tuple[str, ...] = ()
    starts: bool = True


_RESTARTS = Parameter(
    "restarts", 10, False, "Runs that visit the groups in different random orders; the best is kept.", "int", 1
)
_SWEEPS = Parameter(
    "sweeps", 100, False, "Most rounds over all groups; a run ends early when nothing changes.", "int", 1
)
_SEED = Parameter("seed", 0, False, "Seed of the random orders, if there are any.", "int", 0)
_NORMALISE = Parameter("normalise", False, False, "Divide every tensor by its norm, so that all count equally.", "bool")

_METHODS = (
    AlignMethod(
        "weight_matching",
        "Permutations that bring the weights closest, one group at a time with the others fixed.",
        "Ainsworth et al. 2023 (2209.04836), algorithm 1",
        "no",
        (_RESTARTS, _SWEEPS, _SEED, _NORMALISE),
    ),
    AlignMethod(
        "activation_matching",
        "Permutations that pair the units whose activations correlate most.",
        "Ainsworth et al. 2023 (2209.04836), section 3.1; Li et al. 2016 (1511.07543)",
        "required",
        (_SEED,),
        starts=False,
    ),
    AlignMethod(
        "ot",
        "Optimal transport of units, layer after layer; widths may differ. Mixing units changes outputs.",
        "Singh and Jaggi 2020 (1910.05653), algorithm 1",
        "optional",
        (
            Parameter(
                "regularisation",
                0.0,
                False,
                "Entropy of the transport, as a factor of the largest cost (Sinkhorn); 0 is exact.",
                minimum=0,
            ),
            Parameter(
                "cost",
                "euclidean",
                False,
                "Distance between units: of their incoming weights, or of their activations.",
                "str",
                choices=("euclidean", "squared", "cosine"),
            ),
            _SEED,
        ),
        starts=False,
    ),
    AlignMethod(
        "rotation",
        "Permutations, and the other symmetries of a Llama: rotations of the residual, of values and of rotary pairs; "
        "signs.",
        "2502.00264 (rotation symmetry), 2506.22712; polar factors by Procrustes",
        "optional",
        (replace(_RESTARTS, default=1), _SWEEPS, _SEED, replace(_NORMALISE, default=True)),
        idle=("restarts", "sweeps", "normalise"),
    ),
)
OTHER_WIDTHS = ("ot",)  # methods that map units of one width onto another
ALIGN_METHODS = MappingProxyType({method.name: method for method in _METHODS})


def align_options(method: str, given: Mapping[str, Any], *, statistics: bool, place: str = "align") -> dict[str, Value]:
    """The value of every parameter with an effect. Raises PlanError with a list of all problems.

    statistics: True with a statistics file. place: the request's name in messages.
    """
    spec = ALIGN_METHODS.get(method)
    if spec is None:
        raise PlanError(f"{place}.method: unknown method {method!r}, {did_you_mean(method, ALIGN_METHODS)}")
    parameters = {parameter.name: parameter for parameter in spec.parameters}
    idle = spec.idle if statistics else ()
    values = {name: parameter.default for name, parameter in parameters.items() if name not in idle}
    problems = []
    for name, value in given.items():
        if name not in parameters:
            problems.append(f"{place}.{name}: {method} has no such parameter, {did_you_mean(name, parameters)}")
            continue
        if name in idle:
            problems.append(f"{place}.{name}: with statistics {method} finds every group at once; remove it")
            continue
        try:
            values[name] = read_value(value, parameters[name], f"{place}.{name}")
        except ValueError as wrong:
            problems.append(str(wrong))
    if spec.statistics == "required" and not statistics:
        problems.append(
            f"{place}.stats: {method} needs cross moments of both models on the same data. Collect them with "
            "`mergekit-lfm stats cross A B --data FILE ...`"
        )
    if spec.statistics == "no" and statistics:
        problems.append(f"{place}.stats: {method} reads no statistics; remove them, or choose another method")
    if problems:
        raise PlanError("\n".join(problems))
    return values  # type: ignore[return-value]
