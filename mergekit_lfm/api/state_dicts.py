"""`merge_state_dicts`: models in memory merged by a method, tensor by tensor, with the parameters of a recipe."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergekit_lfm.api.in_memory import Dtypes, as_state_dict, is_model, read_dtypes, refuse_other_types
from mergekit_lfm.api.tensors import find_method, merge_checked
from mergekit_lfm.errors import PlanError, did_you_mean, several
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter, Value
from mergekit_lfm.recipe.parts import Input, Part, Scope
from mergekit_lfm.recipe.problems import Problem, attempt, refuse
from mergekit_lfm.recipe.requirements import lacking_models
from mergekit_lfm.recipe.settings import SettingsTable
from mergekit_lfm.recipe.values import Setting, read_setting

if TYPE_CHECKING:
    import torch

    StateDict = Mapping[str, torch.Tensor] | torch.nn.Module

MODELS_OWN = "a value for all models, a list with one for each, or a mapping from models to values"


def merge_state_dicts(
    models: Sequence[StateDict] | Mapping[Any, StateDict],
    method: str,
    *,
    base: StateDict | Hashable | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    strict: bool = True,
    dtype: torch.dtype | str | None = None,
    out_dtype: torch.dtype | str | None = None,
    batch_options: object = None,  # noqa: ARG001
    **more: Any,
) -> dict[str, torch.Tensor]:
    """The merge of models in memory, from names to tensors, as a recipe with the same parameters merges saved models.

    models: state dicts or modules, in a list or by names. base: one of them, by its index or name, or a further model.
    Parameters are given by name, or as a mapping in `parameters`; `lambda` as `lambda_`. Each has the forms of a
    recipe: a value, a gradient over the layers, or rules with `filter` and `value`. A parameter that is given for
    each input is one of these for all inputs; or a list with one for each, the base among them if the method counts it;
    or a mapping with one for each model that has its own. seed: as of a recipe.

    The models need the same tensors. Those that are not floating are copied and have to be equal; buffers that loaders
    compute are the base's, else the first model's; running statistics are averaged. Tensors that share memory in all
    models are merged once. strict: False to leave out tensors that some models lack. dtype, out_dtype: of the merged
    tensors, as in a recipe; by default each has that to which those of the models promote. batch_options: of mergekit,
    whose callers give it; tensors are merged one at a time. Raises PlanError with everything that does not fit. Use
    `merge` for statistics, and for `scope: global`.
    """
    declared = find_method(method)
    refuse_other_types(models, parameters, seed)
    roles = _read_roles(models, declared, base)
    options = {**(parameters or {}), **{"lambda" if name == "lambda_" else name: raw for name, raw in more.items()}}
    part = _read_part(declared, roles, options)
    if not strict:
        roles = roles.in_common()
    _refuse_differences(roles)
    _refuse_idle_filters(part, roles.template)
    return _merge_all(part, roles, seed, read_dtypes(dtype, out_dtype))


@dataclass(frozen=True, slots=True)
class _Roles:
    """The models: the method's inputs by their names, and the base that it subtracts.

    template: the base, else the first.
    """

    inputs: dict[str, Mapping[str, torch.Tensor]]
    base: Mapping[str, torch.Tensor] | None
    template: Mapping[str, torch.Tensor]

    @property
    def all(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """All models, the base last."""
        return self.inputs if self.base is None else {**self.inputs, "base": self.base}

    def in_common(self) -> _Roles:
        """The same models with the tensors that all of them have. Raises PlanError if there are no such tensors."""
        names = [name for name in self.template if all(name in model for model in self.all.values())]
        if not names:
            raise PlanError("the models have no tensor in common: give models whose names agree")

        def cut(model: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            return {name: model[name] for name in names}

        inputs = {key: cut(model) for key, model in self.inputs.items()}
        return _Roles(inputs, None if self.base is None else cut(self.base), cut(self.template))


def _read_roles(
    models: Sequence[StateDict] | Mapping[Any, StateDict], method: Method, base: StateDict | Hashable | None
) -> _Roles:
    """The roles of the models. Raises PlanError for a base that is not one of them, and for too few or many."""
    pairs = list(models.items()) if isinstance(models, Mapping) else list(enumerate(models))
    held = {str(key): as_state_dict(model, str(key)) for key, model in pairs}
    if base is None:
        return _Roles(held, None, next(iter(held.values()), {}))
    name = "base" if is_model(base) else str(base)
    if not is_model(base) and name not in held:
        raise PlanError(f"base: found {base!r}, expected one of the models ({', '.join(held)}) or a state dict")
    template = as_state_dict(base, name) if is_model(base) else held[name]
    if method.base == "member":
        return _Roles(held if name in held else {name: template, **held}, None, template)
    others = {key: model for key, model in held.items() if key != name}
    if method.base == "first":
        return _Roles({name: template, **others}, None, template)
    return _Roles(others, template, template)


def _read_part(method: Method, roles: _Roles, options: Mapping[str, Any]) -> Part:
    """The models with all parameters, as of a recipe. Raises PlanError with all that is wrong in them."""
    known = {parameter.name: parameter for parameter in method.parameters}
    shared: dict[str, Setting] = {}
    own: dict[str, dict[str, Setting]] = {name: {} for name in roles.inputs}
    problems: list[Problem] = []
    for name, raw in options.items():
        if name not in known:
            problems.append(Problem(name, f"{method.name} has no such parameter, {did_you_mean(name, known)}"))
            continue
        for key, value in _split(raw, known[name], roles.inputs, problems):
            place = name if key is None else f"{name} of model {key}"
            setting, wrong = attempt(partial(read_setting, value, known[name]), place)
            problems += wrong
            if setting is not None:
                (shared if key is None else own[key])[name] = setting
    inputs = tuple(Input(key, Path(key), key, place=f"model {key}", settings=own[key]) for key in roles.inputs)
    base = None if roles.base is None else Input("base", Path("base"), "base")
    if method.base == "first":
        base = next(iter(inputs), None)
    part = Part(method.name, base, inputs, inputs, (Scope("parameters", shared),))
    refuse(problems or [*_missing(part), *_unset(part)])
    refuse(list(_unsupported(part)))
    return part


def _refuse_idle_filters(part: Part, names: Iterable[str]) -> None:
    """Raise PlanError about all filters that match no tensor."""
    known, problems = list(names), list[Problem]()
    for model in (None, *part.inputs):
        settings = part.scopes[0].settings if model is None else model.settings
        for name, rule in ((name, rule) for name, setting in settings.items() for rule in setting):
            if rule.filter is not None and not any(rule.filter in each for each in known):
                place = name if model is None else f"{name} of {model.place}"
                near = did_you_mean(rule.filter, {part for each in known for part in each.split(".")})
                problems.append(Problem(place, f"filter {rule.filter!r} is part of no tensor's name, {near}"))
    refuse(problems)


def _missing(part: Part) -> Iterator[Problem]:
    """The models that the method lacks, or has too many of."""
    for problem in lacking_models(part):
        yield problem._replace(place="base") if problem.place == "base_model" else problem


def _split(
    raw: Any, parameter: Parameter, inputs: Iterable[str], problems: list[Problem]
) -> Iterator[tuple[str | None, Any]]:
    """The values of a parameter by their models; None for all of them."""
    keys = list(inputs)
    if not parameter.per_input or (isinstance(raw, Mapping) and {*raw} <= {"filter", "value"}):
        yield None, raw
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            if str(key) in keys:
                yield str(key), value
            else:
                text = f"found a value for model {key!r}, expected {MODELS_OWN}; the models are {', '.join(keys)}"
                problems.append(Problem(parameter.name, text))
    elif isinstance(raw, Sequence) and not isinstance(raw, str) and not any(isinstance(v, Mapping) for v in raw):
        if len(raw) == len(keys):
            yield from zip(keys, raw, strict=True)
        else:
            text = f"found {len(raw)} values, expected {MODELS_OWN}; the models are {', '.join(keys)}"
            problems.append(Problem(parameter.name, text))
    else:
        yield None, raw


def _unset(part: Part) -> Iterator[Problem]:
    """Every parameter without a default that is given nowhere."""
    for parameter in part.method.parameters:
        given = [model for model in part.inputs if parameter.name in model.settings]
        if (
            parameter.default is REQUIRED
            and parameter.name not in part.scopes[0].settings
            and len(given) < (len(part.inputs) if parameter.per_input else 1)
        ):
            yield Problem(parameter.name, f"required by {part.method.name}: {parameter.doc}")


def _unsupported(part: Part) -> Iterator[Problem]:
    """A problem if the method needs more than tensors."""
    found = {parameter.name: part.find(parameter, None, "", None)[0] for parameter in part.parameters_of(None)}
    shared = {name: cast(Value, value) for name, value in found.items() if value is not REQUIRED}
    if part.method.statistics is not None:
        yield Problem("method", f"{part.method.name} needs statistics; merge saved models, with `stats` in the recipe")
    elif part.method.scope(shared) == "model":
        yield Problem("scope", "one solve over the whole model needs saved models; merge them, or use `scope: tensor`")


def _refuse_differences(roles: _Roles) -> None:
    """Raise PlanError about all tensors that only some models have, or in one shape or kind."""
    problems = []
    for name in dict.fromkeys(name for model in roles.all.values() for name in model):
        lacking = [key for key, model in roles.all.items() if name not in model]
        forms = {key: _form(model[name]) for key, model in roles.all.items() if name in model}
        if lacking:
            problems.append(f"{name}: missing in {', '.join(lacking)}")
        elif len(set(forms.values())) > 1:
            problems.append(f"{name}: " + ", ".join(f"{key} has {form}" for key, form in forms.items()))
    if problems:
        raise PlanError(several("the models differ", problems))


def _form(tensor: torch.Tensor) -> str:
    """The shape, and of a tensor that is only copied the dtype."""
    shape = str(list(tensor.shape))
    return shape if _is_merged(tensor) else f"{shape} {tensor.dtype}"


def _is_merged(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def _merge_all(part: Part, roles: _Roles, seed: int, dtypes: Dtypes) -> dict[str, torch.Tensor]:
    """All tensors of the merged model."""
    from mergekit_lfm.plan.layers import find_layers

    layers, table = find_layers(roles.template), SettingsTable(part)
    first: dict[tuple[Any, ...], str] = {}  # the name of each tensor in memory
    merged: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for name in roles.template:
        memory = tuple(_memory_of(model[name]) for model in roles.all.values())
        twin = first.setdefault(memory, name)
        if twin != name:
            merged[name] = merged[twin]
            continue
        try:
            merged[name] = _merge_one(part, roles, name, layers.get(name), table, seed, dtypes)
        except PlanError as error:
            problems.append(f"{name}: {error}")
            merged[name] = roles.template[name]
    if problems:
        raise PlanError(several("the models cannot be merged", problems))
    return merged


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The memory of a tensor, the same for tied weights."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if tensors of one shape and dtype have the same values; of float8 the same bytes."""
    import torch

    if one.is_floating_point():  # torch compares no float8
        one, other = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    return torch.equal(one, other.to(one.device))


def _merge_one(
    part: Part,
    roles: _Roles,
    name: str,
    layer: tuple[int, int] | None,
    table: SettingsTable,
    seed: int,
    dtypes: Dtypes,
) -> torch.Tensor:
    """One tensor of the merged model."""
    import torch

    from mergekit_lfm.arch.kinds import kind_of
    from mergekit_lfm.methods.registry import METHODS
    from mergekit_lfm.plan.job import averaging_settings, is_averaged
    from mergekit_lfm.store.tensors import TensorSpec

    tensors, template = [model[name] for model in roles.inputs.values()], roles.template[name]
    base = None if roles.base is None else roles.base[name]
    kind = kind_of(TensorSpec(name, tuple(template.shape), str(template.dtype).removeprefix("torch.")))
    if kind == "constant":
        return template.detach().clone()
    if not _is_merged(template):
        if kind == "counter":
            return torch.stack(tensors).amax(0)
        if not all(_are_equal(template, each) for each in tensors):
            raise PlanError(f"found {template.dtype} with other values in other models, which cannot be merged")
        return template.detach().clone()
    method, settings = part.method, table.of(name, layer)
    if is_averaged(method, kind, settings):
        method, settings, base = METHODS["linear"], averaging_settings(settings), None
    tensors, base = [dtypes.widen(x) for x in tensors], None if base is None else dtypes.widen(base)
    return dtypes.finish(merge_checked(method, name, settings, tensors, base, (), seed))
