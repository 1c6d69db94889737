"""Merge recipes, in mergekit's YAML or as a mapping, checked completely before any work.

A `Recipe` object is valid in itself: every key, method, parameter and value is known and within bounds at every scope,
and every model's folder exists. The plan checks whether the tensors fit together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from mergekit_lfm.arch.facts import FACTS
from mergekit_lfm.errors import PlanError, Refusal, did_you_mean
from mergekit_lfm.methods.method import REQUIRED, Method, Value
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.chat import read_chat_template
from mergekit_lfm.recipe.dialect import read_dialect
from mergekit_lfm.recipe.form import (
    Dtype,
    Edits,
    ModelEntry,
    Parameters,
    Push,
    Reference,
    Strict,
    read_reference,
)
from mergekit_lfm.recipe.problems import Problem, parts_of, problem_at, refuse
from mergekit_lfm.recipe.rename import rename_data
from mergekit_lfm.recipe.requirements import missing_requirements
from mergekit_lfm.recipe.roles import Edit, Input, Roles, assign_roles
from mergekit_lfm.recipe.tokenizer import TokenizerRequest, read_tokenizer
from mergekit_lfm.recipe.validation import content_problems, form_problems, without_faults
from mergekit_lfm.recipe.values import FOUND, NamedFile, Rule, as_data, value_at
from mergekit_lfm.store.files import read_text
from mergekit_lfm.store.yaml import read_yaml

IN_YAML = "a recipe in YAML"


def _read_allowed(value: object) -> object:
    """The facts in a recipe's `allow`. Raises Refusal for one that does not exist."""
    names = [value] if isinstance(value, str) else [] if value is None else value
    for name in names if isinstance(names, list | tuple) else ():
        if name not in FACTS:
            raise Refusal("unknown fact {found}, {cure}", found=repr(name), cure=did_you_mean(name, FACTS))
    return names


@dataclass(frozen=True, slots=True)
class Settings:
    """Every parameter's value for one output tensor: the values that all inputs share, and one mapping per input."""

    shared: dict[str, Value]
    inputs: tuple[dict[str, Value], ...]


class Recipe(Strict):
    """A merge as the user wrote it. `dtype` is the output's unless `out_dtype` names another; arithmetic is float32.

    edits: changes to the result of the merge, before it is rounded. push: the result's repository on the Hub, as
    `org/name` or {repo, private}. device: where the merge is computed: cpu, cuda, cuda:1 or auto.
    card: whether the result gets a model card.

    tensors: "common" merges what all models share and keeps the rest of the base. keep: for parts of tensors' names
    whose tensors are kept: "base", one of the models, or "drop". rows: of vocabularies that differ in length "crop"
    those beyond the shortest, or "keep" those of the base. allow: facts in which the models may differ.
    tokenizer_source: whose tokens the output has, those of the "base", the "union", or a model's; `tokenizer` is its
    long form. chat_template: auto, a built-in one's name, or Jinja.

    Build one with `Recipe.load` or `Recipe.parse`. Relative model paths are relative to the recipe's folder, then to
    the working directory; `output` is relative to the working directory.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: Reference | None = None
    edits: Edits = ()
    parameters: Parameters = Field(default_factory=dict)
    dtype: Dtype = None
    out_dtype: Dtype = None
    output: Annotated[str | None, BeforeValidator(read_reference)] = None
    push: Annotated[
        Push | None, BeforeValidator(lambda value: {"repo": value} if isinstance(value, str) else value)
    ] = None
    seed: int = Field(default=0, strict=True, ge=0, lt=2**64)
    device: str = Field(default="cpu", pattern=r"^(cpu|auto|cuda(:\d+)?)$")
    tensors: Literal["all", "common"] = "all"
    keep: Annotated[dict[str, Reference], BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=dict
    )
    rows: Literal["crop", "keep"] | None = None
    allow: Annotated[tuple[str, ...], BeforeValidator(_read_allowed)] = ()
    card: bool = Field(default=True, strict=True)
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: Annotated[str | None, BeforeValidator(read_chat_template)] = None

    _roles: Roles = PrivateAttr()
    _text: str | None = PrivateAttr(default=None)
    _notices: tuple[str, ...] = PrivateAttr(default=())
    _tokenizer: TokenizerRequest | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The recipe in the file `path`. Raises PlanError with a list of all its problems."""
        path = Path(path)
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise PlanError(
                "{place}: cannot be read: {found}; expected {expected}", place=path, found=reason, expected=IN_YAML
            ) from error
        return cls.parse(text, where=path.absolute().parent, label=str(path))

    @classmethod
    def parse(cls, source: Mapping[str, Any] | str, where: Path | None = None, label: str = "recipe") -> Self:
        """The recipe in YAML text or a mapping, as if read from the folder `where`; messages call it `label`."""
        data = read_yaml(source, label) if isinstance(source, str) else source
        if not isinstance(data, Mapping):
            expected = "a mapping with merge_method and models"
            raise PlanError(f"{{place}}: {FOUND}", place=label, found=f"{data!r:.40}", expected=expected)
        try:
            ours, notices = read_dialect(data, cls.model_fields)
            recipe = cls.model_validate(ours, context={"where": where, "whole": True})
            recipe._text = source if isinstance(source, str) else None
            recipe._notices = notices
            return recipe
        except ValidationError as error:
            problems = [*content_problems(error), *form_problems(error, cls)]
            rest = without_faults(data, error)
        if rest != data:  # errors of form hide errors of content
            try:
                cls.model_validate(rest, context={"where": where, "whole": False})
            except ValidationError as error:
                problems += content_problems(error)
        count = f"{len(problems)} problems\n  " if len(problems) > 1 else ""
        parts = parts_of(problems)
        place = ": ".join([label, *([parts.pop("place")] if "place" in parts else [])])
        lines = "\n  ".join(map(str, problems))
        raise PlanError("{label}: {count}{lines}", label=label, count=count, lines=lines, place=place, **parts)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        context = info.context or {"where": None, "whole": True}
        method = METHODS.get(self.merge_method)
        if method is None:
            words = {"found": repr(self.merge_method), "cure": did_you_mean(self.merge_method, METHODS)}
            raise PlanError("{place}: unknown method {found}, {cure}", place="merge_method", **words)
        roles, problems = assign_roles(
            method, self.models, self.base_model, self.parameters, self.edits, context["where"]
        )
        problems += self._check_keep(roles)
        models = {model.label: model.ref for model in (*([roles.base] if roles.base else []), *roles.lines)}
        tokenizer, wrong = read_tokenizer(self.tokenizer_source, self.tokenizer, models)
        problems += wrong
        if context["whole"]:  # the rest of a recipe may lack what its wrong keys were to give
            problems = problems or missing_requirements(method, roles)
        refuse(problems)
        self._roles, self._tokenizer = roles, tokenizer
        return self

    def _check_keep(self, roles: Roles) -> list[Problem]:
        """A problem for each value of `keep` that does not name a model."""
        known = {"base", "drop", *(model.label for model in (*roles.lines, *([roles.base] if roles.base else [])))}
        return [
            problem_at(
                f"keep.{part}",
                FOUND + "; {cure}",
                found=repr(choice),
                expected="base, drop or one of the models",
                cure=did_you_mean(choice, known),
            )
            for part, choice in self.keep.items()
            if choice not in known
        ]

    def goal(self, repo: str | None, *, private: bool = False) -> Push | None:
        """Where to push the result: `repo`, else the recipe's `push`, else None. private: make it private in any case.

        Raises PlanError if `repo` is not a repository's name.
        """
        try:
            push = self.push if repo is None else Push(repo=repo)
        except ValidationError:
            raise PlanError(f"found {repo!r} to push to, expected a repository on the Hub as org/name") from None
        return push and Push(repo=push.repo, private=push.private or private)

    @property
    def text(self) -> str | None:
        """The recipe as its file has it, None if it was not read from text."""
        return self._text

    @property
    def notices(self) -> tuple[str, ...]:
        """The entries of the recipe without an effect here, a line for each."""
        return (*self._notices, *self._roles.notices)

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.merge_method]

    @property
    def base(self) -> Input | None:
        """The base model; with some methods it is also one of the inputs."""
        return self._roles.base

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The method's inputs in the recipe's order."""
        return self._roles.inputs

    @property
    def statistics(self) -> tuple[NamedFile, ...]:
        """The statistics file of each input, or () if the method takes no statistics."""
        return tuple(model.stats for model in self.inputs if model.stats is not None)

    @property
    def result_edits(self) -> tuple[Edit, ...]:
        """The edits of the merge's result, in order."""
        return self._roles.edits

    @property
    def tokenizer_request(self) -> TokenizerRequest | None:
        """The tokenizer that the recipe asks for."""
        return self._tokenizer

    def without_result_edits(self) -> Recipe:
        """The recipe without the edits of its result."""
        plain = self.model_copy(update={"edits": ()})
        plain._roles = replace(self._roles, edits=())
        return plain

    @property
    def all_models(self) -> tuple[Input, ...]:
        """Every model the recipe reads, the base first."""
        base = () if self.base is None else (self.base,)
        return tuple(dict.fromkeys((*base, *self.inputs)))

    def settings(self, tensor: str, layer: tuple[int, int] | None) -> Settings:
        """The values of all parameters for the output tensor `tensor` in layer (index, count), None outside the layers.

        A model's own settings win over the top level's, and these over the method's default. Raises PlanError if a
        parameter without a default has filters but none matches.
        """
        shared, problems = self._values(None, tensor, layer)
        inputs = [self._values(model, tensor, layer) for model in self.inputs]
        refuse([*problems, *(problem for _, missing in inputs for problem in missing)])
        return Settings(shared, tuple(values for values, _ in inputs))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of all settings."""
        settings = [self._roles.settings, *(model.settings for model in self.inputs)]
        return tuple(rule for values in settings for setting in values.values() for rule in setting)

    def _values(
        self, model: Input | None, tensor: str, layer: tuple[int, int] | None
    ) -> tuple[dict[str, Value], list[Problem]]:
        """The per-input values of `model`, or the shared ones for None; and a problem for each without a value."""
        scopes = [model.settings, self._roles.settings] if model else [self._roles.settings]
        values: dict[str, Value] = {}
        missing: list[Problem] = []
        for parameter in (p for p in self.method.parameters if p.per_input == (model is not None)):
            name = parameter.name
            candidates = (value_at(scope[name], parameter, tensor, layer) for scope in scopes if name in scope)
            value = next((candidate[0] for candidate in candidates if candidate is not None), parameter.default)
            if value is REQUIRED:
                place = f"{model.place}." if model else ""
                text = f"no filter matches {tensor}; add an entry without a filter"
                missing.append(Problem(f"{place}parameters.{name}", text))
            else:
                values[name] = cast(Value, value)
        return values, missing

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same merge on any machine."""
        models = [
            {"model": line.ref, "parameters": {k: as_data(v) for k, v in sorted(line.settings.items())}}
            | ({} if line.stats is None else {"stats": line.stats.ref})
            | _align_data(line.align)
            | _edits_data(line.edits)
            | ({"rename": rename_data(line.rename)} if line.rename else {})
            for line in self._roles.lines
        ]
        return {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": models,
            "parameters": {k: as_data(v) for k, v in sorted(self._roles.settings.items())},
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "seed": self.seed,
            **_edits_data(self.result_edits),
            **({"tensors": self.tensors} if self.tensors != "all" else {}),
            **({"keep": self.keep} if self.keep else {}),
            **({"rows": self.rows} if self.rows else {}),
            **({"allow": sorted(self.allow)} if self.allow else {}),
            **({"tokenizer": self._tokenizer.as_data()} if self._tokenizer else {}),
            **({"chat_template": self.chat_template} if self.chat_template else {}),
        }


def _align_data(align: NamedFile | AlignRequest | None) -> dict[str, Any]:
    if align is None:
        return {}
    return {"align": align.ref if isinstance(align, NamedFile) else align.as_data()}


def _edits_data(edits: tuple[Edit, ...]) -> dict[str, Any]:
    data = [edit.ref if isinstance(edit, NamedFile) else edit.as_data() for edit in edits]
    return {"edits": data} if data else {}
