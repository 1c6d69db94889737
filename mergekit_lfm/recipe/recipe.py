"""Merge recipes, in mergekit's YAML or as a mapping, checked completely before any work.

A `Recipe` object is valid in itself: every key, method, parameter and value is known and within bounds at every scope,
and every model's folder exists. The plan checks whether the tensors fit together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from mergekit_lfm.arch.facts import FACTS
from mergekit_lfm.errors import PlanError, Refusal, did_you_mean
from mergekit_lfm.methods.method import Method
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.canonical import edits_data, settings_data, structure_data
from mergekit_lfm.recipe.chat import read_chat_template
from mergekit_lfm.recipe.dialect import read_dialect
from mergekit_lfm.recipe.files import Where
from mergekit_lfm.recipe.foreign import refuse_foreign, unknown_method
from mergekit_lfm.recipe.form import (
    Dtype,
    Edits,
    ModelEntry,
    Models,
    Modules,
    Parameters,
    Push,
    Reference,
    SliceEntry,
    Slices,
    Strict,
    read_reference,
)
from mergekit_lfm.recipe.parts import Edit, Input, Part
from mergekit_lfm.recipe.problems import Problem, problem_at, refuse
from mergekit_lfm.recipe.requirements import missing_requirements
from mergekit_lfm.recipe.roles import read_base, read_edits
from mergekit_lfm.recipe.structure import Structure
from mergekit_lfm.recipe.tokenizer import TokenizerRequest, read_tokenizer
from mergekit_lfm.recipe.validation import find_problems, read_document, read_form
from mergekit_lfm.recipe.values import FOUND, NamedFile
from mergekit_lfm.store.elsewhere import destination
from mergekit_lfm.store.files import read_text

IN_YAML = "a recipe in YAML"


def read_recipe(path: str | Path) -> str:
    """The text of a recipe's file. Raises PlanError if it cannot be read."""
    try:
        return read_text(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PlanError(
            "{place}: cannot be read: {found}; expected {expected}", place=path, found=reason, expected=IN_YAML
        ) from error


def _read_allowed(value: object) -> object:
    """The facts in a recipe's `allow`. Raises Refusal for one that does not exist."""
    names = [value] if isinstance(value, str) else [] if value is None else value
    for name in names if isinstance(names, list | tuple) else ():
        if name not in FACTS:
            raise Refusal("unknown fact {found}, {cure}", found=repr(name), cure=did_you_mean(name, FACTS))
    return names


class Recipe(Strict):
    """A merge as the user wrote it. `dtype` is the output's unless `out_dtype` names another; arithmetic is float32.

    models: merged whole; or slices: of their layers, stacked; or modules: models or slices for parts of the model,
    which may name a method of their own. merge_method: may be left out where single models are copied.

    edits: changes to the result of the merge, before it is rounded. push: the result's repository on the Hub, as
    `org/name` or {repo, private}. device: where the merge is computed: cpu, cuda, cuda:1 or auto.
    card: whether the result gets a model card.

    tensors: "common" merges what all models share and keeps the rest of the base. keep: for parts of tensors' names
    whose tensors are kept: "base", one of the models, or "drop". heads: of models with different heads "base" keeps
    that of the base, "drop" leaves them out. rows: of vocabularies that differ in length "crop" those beyond the
    shortest, or "keep" those of the base. allow: facts in which the models may differ. tokenizer_source: whose tokens
    the output has, those of the "base", the "union", or a model's; `tokenizer` is its long form. chat_template: auto, a
    built-in one's name, or Jinja.

    Build one with `Recipe.load` or `Recipe.parse`. Relative model paths are relative to the recipe's folder, then to
    the working directory; `output` is relative to the working directory.
    """

    merge_method: str | None = None
    models: Models = ()
    slices: Slices = ()
    modules: Modules = Field(default_factory=dict)
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
    heads: Literal["base", "drop"] | None = None
    rows: Literal["crop", "keep"] | None = None
    allow: Annotated[tuple[str, ...], BeforeValidator(_read_allowed)] = ()
    card: bool = Field(default=True, strict=True)
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: Annotated[str | None, BeforeValidator(read_chat_template)] = None

    _parts: tuple[Part, ...] = PrivateAttr()
    _base: Input | None = PrivateAttr()
    _result_edits: tuple[Edit, ...] = PrivateAttr()
    _text: str | None = PrivateAttr(default=None)
    _notices: tuple[str, ...] = PrivateAttr(default=())
    _tokenizer: TokenizerRequest | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, path: str | Path, *, allow_unknown: bool = False) -> Self:
        """The recipe in the file `path`. Raises PlanError with a list of all its problems.

        allow_unknown: as of `parse`.
        """
        where = Path(path).absolute().parent
        return cls.parse(read_recipe(path), where, str(path), allow_unknown=allow_unknown)

    @classmethod
    def parse(
        cls,
        source: Mapping[str, Any] | str,
        where: Path | None = None,
        label: str = "recipe",
        stages: Mapping[str, Path] = MappingProxyType({}),
        *,
        allow_unknown: bool = False,
    ) -> Self:
        """The recipe in YAML text or a mapping, as if read from the folder `where`; messages call it `label`.

        stages: the folders of models that it calls by the names of earlier stages. allow_unknown: a notice, in place
        of an error, about each key that is unknown.
        """
        data = read_document(source, label, "a mapping with merge_method and models")
        refuse_foreign(data, label)
        recipe, ignored = read_form(
            partial(cls._read, where=Where(where, stages)), data, label, allow_unknown=allow_unknown
        )
        recipe._text = source if isinstance(source, str) else None
        recipe._notices = (*ignored, *recipe._notices)
        return recipe

    @classmethod
    def _read(cls, data: Mapping[str, Any], where: Where) -> tuple[Self | None, list[Problem]]:
        """The recipe; or None, and all problems."""
        notices = list[str]()

        def prepare(data: Mapping[str, Any]) -> Mapping[str, Any]:
            ours, told = read_dialect(data, cls.model_fields)
            notices.extend(told)
            return ours

        recipe, problems = find_problems(cls, data, where, prepare)
        if recipe is not None:
            recipe._notices = (*notices, *recipe._notices)
        return recipe, problems

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        context = info.context or {"where": Where(), "whole": True}
        methods = self._find_methods()
        base, problems = read_base(self.base_model, context["where"], "base_model")
        structure = Structure(tuple(dict.fromkeys(methods.values())), context["where"], context["whole"])
        if self.modules:
            structure.read_modules(self.modules, methods, base, self.parameters)
        elif self.slices:
            structure.read_slices(self.slices, base, [("parameters", self.parameters)])
        else:
            structure.read_models(self.models, base, self.parameters)
        edits, wrong = read_edits(self.edits, context["where"], "edits")
        parts = structure.parts
        problems += [*structure.problems, *structure.conflicts(), *wrong]
        if base is not None and not self.slices and not self.modules:
            base = parts[0].base
        self._parts, self._base, self._result_edits = tuple(parts), base, edits
        models = {model.label: model.ref for model in self.all_models}
        self._tokenizer, wrong = read_tokenizer(self.tokenizer_source, self.tokenizer, models)
        problems += [*self._check_keep(), *wrong]
        if context["whole"]:  # the rest of a recipe may lack what its wrong keys were to give
            problems = problems or [problem for part in parts for problem in missing_requirements(part)]
        refuse(list({str(problem): problem for problem in problems}.values()))
        self._notices = tuple(dict.fromkeys(structure.notices))
        return self

    def _find_methods(self) -> dict[str, Method]:
        """The methods of the modules by their names, and of the whole by "". Raises PlanError for an unknown one."""
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) > 1:
            raise PlanError(f"found {' and '.join(f'`{key}`' for key in given)}, expected one of them")
        if not given and self.base_model is None:
            lacking = [*(["merge_method"] if self.merge_method is None else []), "models"]
            refuse([Problem(place, "required") for place in lacking])
        own = self.merge_method or (_method_of_copies(self.models, self.slices) if given else None)
        names = {
            name: entry.merge_method or self.merge_method or _method_of_copies(entry.models, entry.slices)
            for name, entry in self.modules.items()
        }
        if self.merge_method is not None or not self.modules:
            names = {"": own, **names}
        methods = {}
        for module, name in names.items():
            place = f"modules.{module}.merge_method" if module and self.modules[module].merge_method else "merge_method"
            if name is None:
                raise PlanError("{place}: required", place=place)
            if name not in METHODS:
                sentence, words = unknown_method(name, METHODS)
                raise PlanError("{place}: " + sentence, place=place, **words)
            methods[module] = METHODS[name]
        return methods

    def _check_keep(self) -> list[Problem]:
        """A problem for each value of `keep` that does not name a model."""
        known = {"base", "drop", *(model.label for model in self.all_models)}
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
        if repo is None and self.push is None:
            return None
        try:
            if self.push is not None and repo is None:
                return Push(repo=self.push.repo, private=self.push.private or private)
            return Push(repo=destination(str(repo)), private=private)
        except ValidationError as error:
            raise PlanError(str(error.errors()[0]["ctx"]["error"])) from None
        except ValueError:
            expected = "a repository on the Hub as org/name, or a place in a bucket as s3://bucket/path"
            raise PlanError(f"found {repo!r} to push to, expected {expected}") from None

    @property
    def text(self) -> str | None:
        """The recipe as its file has it, None if it was not read from text."""
        return self._text

    @property
    def notices(self) -> tuple[str, ...]:
        """The entries of the recipe without an effect here, a line for each."""
        return self._notices

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the recipe, by the models and the method."""
        return self._parts

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of the parts, each once."""
        return tuple(dict.fromkeys(part.method for part in self.parts))

    @property
    def base(self) -> Input | None:
        """The base model of the top level; with some methods it is also one of the inputs."""
        return self._base

    @property
    def template(self) -> Input:
        """The model whose form the result has: the base, else the first."""
        return self._base or self.parts[0].base or self.parts[0].inputs[0]

    @property
    def statistics(self) -> tuple[NamedFile, ...]:
        """The statistics files of the inputs, part by part."""
        return tuple(file for part in self.parts for file in part.statistics)

    @property
    def result_edits(self) -> tuple[Edit, ...]:
        """The edits of the merge's result, in order."""
        return self._result_edits

    @property
    def tokenizer_request(self) -> TokenizerRequest | None:
        """The tokenizer that the recipe asks for."""
        return self._tokenizer

    def without_result_edits(self) -> Recipe:
        """The recipe without the edits of its result."""
        plain = self.model_copy(update={"edits": ()})
        plain._result_edits = ()
        return plain

    @property
    def all_models(self) -> tuple[Input, ...]:
        """Every model the recipe reads, the base first."""
        base = () if self.base is None else (self.base,)
        return tuple(dict.fromkeys((*base, *(model for part in self.parts for model in part.models))))

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same merge on any machine."""
        return {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            **structure_data(self.parts, self.slices, self.modules),
            "parameters": settings_data(self.parts, "parameters"),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "seed": self.seed,
            **edits_data(self.result_edits),
            **({"tensors": self.tensors} if self.tensors != "all" else {}),
            **({"keep": self.keep} if self.keep else {}),
            **({"heads": self.heads} if self.heads else {}),
            **({"rows": self.rows} if self.rows else {}),
            **({"allow": sorted(self.allow)} if self.allow else {}),
            **({"tokenizer": self._tokenizer.as_data()} if self._tokenizer else {}),
            **({"chat_template": self.chat_template} if self.chat_template else {}),
        }


def _method_of_copies(models: Sequence[ModelEntry], slices: Sequence[SliceEntry]) -> str | None:
    """The method that nobody has to name: where nothing is merged."""
    return "passthrough" if all(len(each) <= 1 for each in (models, *(piece.sources for piece in slices))) else None
