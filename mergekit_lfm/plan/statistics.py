"""Match statistics to the tensors of a merge.

A statistics file belongs to one model, by its content; a file of another model is an error. Either all inputs have
statistics of a tensor, or none, and then the tensor is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.plan.match import Match
from mergekit_lfm.plan.roles import PartRoles, TensorRef


def find_statistics(roles: PartRoles, matches: Mapping[str, Match]) -> dict[str, tuple[TensorRef, ...]]:
    """The statistics of every output tensor that has them: an entry of each input's file.

    Raises PlanError naming all tensors for which only some inputs have them.
    """
    sources_of: dict[str, tuple[TensorRef, ...]] = {}
    problems = []
    for name, match in matches.items() if roles.statistics else ():
        entries = [
            statistics.entry_of(match.sources.get(i, (0, ""))[1])
            for i, statistics in zip(roles.inputs, roles.statistics, strict=True)
        ]
        lacking = [roles.part.statistics[k].ref for k, entry in enumerate(entries) if entry is None]
        if not lacking:
            sources_of[name] = tuple(
                (roles.first_statistics + k, entry) for k, entry in enumerate(entries) if entry is not None
            )
        elif len(lacking) < len(entries):
            kind = roles.part.method.statistics
            reasons = {statistics.info.skipped.get(_layer_of(name)) for statistics in roles.statistics} - {None}
            why = f" ({'; '.join(sorted(map(str, reasons)))})" if reasons else ""
            problems.append(f"{', '.join(lacking)} lacks the {kind} statistics of {name}, which the others have{why}")
    if problems:
        raise PlanError(
            several("the statistics do not cover the same layers", problems)
            + "\nCollect them all with the same --task and the same --layers, on data that all layers see"
        )
    if roles.statistics and not sources_of:
        raise PlanError("the statistics cover no tensor of the models; collect them without --layers")
    return sources_of


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")
