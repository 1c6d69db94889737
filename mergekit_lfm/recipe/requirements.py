"""Everything that a method needs and a recipe lacks: models, parameters without a default, statistics."""

from __future__ import annotations

from mergekit_lfm.methods.method import REQUIRED
from mergekit_lfm.recipe.parts import Part
from mergekit_lfm.recipe.problems import Problem, problem_at


def missing_requirements(part: Part) -> list[Problem]:
    """Everything that the part's method needs and the recipe lacks."""
    return lacking_models(part) + unset_parameters(part) + _without_statistics(part)


def lacking_models(part: Part) -> list[Problem]:
    """The models that the method lacks, or has too many of."""
    problems: list[Problem] = []
    method, (least, most) = part.method, part.method.inputs
    count = len(part.inputs)
    if part.base is None and method.base in ("required", "first"):
        cure = "name the model that the others were made from"
        problems.append(problem_at("base_model", "required by {method}; {cure}", method=method.name, cure=cure))
    elif not (least <= count and (most is None or count <= most)):
        wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        role = {"member": "", "first": ", the base included"}.get(method.base, ", not counting the base")
        labels = ", ".join(line.label for line in part.inputs) or "none"
        noun = "model" if wanted.endswith(" 1") else "models"
        words = {"expected": f"{wanted} {noun}{role}", "found": f"{count}: {labels}"}
        problems.append(problem_at(part.place, "{method} takes {expected}; found {found}", method=method.name, **words))
    return problems


def unset_parameters(part: Part) -> list[Problem]:
    """Every parameter without a default that the recipe sets nowhere."""
    problems, method = [], part.method
    for parameter in method.parameters:
        name = parameter.name
        if parameter.default is not REQUIRED or any(name in scope.settings for scope in part.scopes):
            continue
        if not parameter.per_input:
            problems.append(Problem(f"parameters.{name}", f"required by {method.name}"))
            continue
        for line in (line for line in part.inputs if name not in line.settings):
            base = line.place.endswith("base_model")
            role = ", for which the base is an input like the others" if base else ""
            advice = "list the base under models with one" if base else "or give one in the top-level `parameters`"
            text = f"{line.label} has no {name}, required by {method.name}{role}; {advice}"
            problems.append(Problem(line.place if base else f"{line.place}.parameters.{name}", text))
    return problems


def _without_statistics(part: Part) -> list[Problem]:
    """Every input that lacks the statistics that the method needs."""
    method = part.method
    if method.statistics is None:
        return []
    problems = []
    for line in (line for line in part.inputs if line.stats is None):
        base = line.place.endswith("base_model")
        role = "; the base is an input like the others: list it under models" if base else ""
        text = (
            f"{method.name} needs the {method.statistics} statistics of {line.label}{role}; collect them with "
            f"`mergekit-lfm stats {method.statistics} {line.label} --data FILE ...` and name the file as the model's "
            "`stats`"
        )
        problems.append(Problem(line.place if base else f"{line.place}.stats", text))
    return problems
