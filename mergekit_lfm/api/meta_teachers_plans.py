"""Initialisations from models without their data that are planned: the models, the request, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_lfm.api.synthesise_plans import STATISTICS, Shape, classes_of, shared_form
from mergekit_lfm.api.tune_plans import TRAINING
from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.machine.launch import is_launched
from mergekit_lfm.machine.resources import total_memory
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.names import public_names
from mergekit_lfm.output.request import Request, RequestInput
from mergekit_lfm.output.save import stand_in
from mergekit_lfm.recipe.meta_memory import Need, estimate_need_of_images
from mergekit_lfm.recipe.meta_teachers import TeachersRecipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.places import beside
from mergekit_lfm.store.tensors import FLOATS
from mergekit_lfm.views.adapted import open_found

FUSED = (
    1_000_000  # numbers of a model that dro can fit: its network has 33 times as many, and the optimizer twice these
)


@dataclass(frozen=True)
class PlannedInitialisation:
    """An initialisation that is checked, and not made yet. form: of images, and the range of pixels, if there are some.

    source: the model that is learned from; teachers: in the order of the recipe.
    """

    recipe: TeachersRecipe
    out: Path
    source: Checkpoint
    teachers: tuple[Checkpoint, ...]
    form: tuple[Shape, tuple[float, float]] | None
    device: str = "cpu"

    @property
    def notices(self) -> tuple[str, ...]:
        """The facts that a user should know."""
        return self.recipe.notices

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The models that are read, by their names in the recipe; the first one is learned from."""
        return {self.recipe.model: self.source, **dict(zip(self.recipe.teachers, self.teachers, strict=True))}

    @property
    def training(self) -> Path:
        """The folder for the state."""
        return beside(self.out, TRAINING)

    @property
    def floats(self) -> tuple[str, ...]:
        """The names of the tensors that are learned."""
        return tuple(name for name, spec in self.source.items() if spec.dtype in FLOATS)

    @property
    def size(self) -> int:
        """How many numbers the model has."""
        return sum(spec.numel for spec in self.source.values())

    @cached_property
    def need(self) -> Need | None:
        """The memory of a step over images; None for others, and for a config without the sizes of activations."""
        if self.form is None:
            return None
        models = [(model.config, _numbers(model)) for model in (self.source, *self.teachers)]
        return estimate_need_of_images(self.recipe, classes_of(self.source), models)

    @cached_property
    def request(self) -> Request:
        """The request that the result answers."""
        whole = {**self.recipe.normalised(), "device": self.device.partition(":")[0]}
        if self.form is not None:
            whole |= {"shape": [*self.form[0]], "pixels": [*self.form[1]]}
        names = public_names([*self.models])
        public = {**whole, "model": names[self.recipe.model], "teachers": [names[x] for x in self.recipe.teachers]}
        inputs = tuple(RequestInput(ref, source, source.config) for ref, source in self.models.items())
        return Request(whole, public, inputs, LOCK)

    def stand_in(self, folder: Path) -> None:
        """Write a folder like the result without data."""
        stand_in(self.source, folder)


def plan_from_teachers(
    recipe: TeachersRecipe, out: Path, *, device: str | None = None, memory: int | None = None
) -> PlannedInitialisation:
    """Check an initialisation from models without data. Reads headers and configs.

    memory: a budget in bytes, by default the machine's. Raises PlanError for models that do not go together, for one
    that is too large for `dro`, for one with BatchNorm that is to adapt, for a step that needs more than the budget,
    and without the device; FormatError for a damaged model.
    """
    source, teachers = open_found(recipe.found), tuple(open_found(found) for found in recipe.found_teachers)
    if is_launched():
        raise PlanError("torchrun shares no initialisation from teachers; start it alone")
    named = [(recipe.model, source), *zip(recipe.teachers, teachers, strict=True)]
    form = None
    if recipe.row.alike:
        _check_alike(named)
    else:
        form = shared_form(named, recipe.size, recipe.low, recipe.high)
        _check_classifiers(named)
    place = "cpu" if device is None else str(find_device(device))  # which needs torch
    planned = PlannedInitialisation(recipe, out, source, teachers, form, place)
    numbers = _numbers(source)
    if recipe.algorithm == "dro" and numbers > FUSED:
        raise PlanError(
            f"{recipe.model} has {numbers:,} numbers; expected at most {FUSED:,} for dro, whose network is 33 times as "
            "large. Choose average, or for classifiers of images purer or bidf"
        )
    if planned.need is not None and place == "cpu":
        planned.need.check(total_memory() if memory is None else memory)
    return planned


def _numbers(model: Checkpoint) -> int:
    """How many numbers a model has that can be learned."""
    return sum(spec.numel for spec in model.values() if spec.dtype in FLOATS)


def _check_alike(named: Sequence[tuple[str, Checkpoint]]) -> None:
    """Raise PlanError with all tensors in which teachers differ from the model."""
    (first, source), *others = named
    wrong = list[str]()
    for name, teacher in others:
        for tensor in sorted({*source} | {*teacher}):
            shapes = [list(x[tensor].shape) if tensor in x else None for x in (source, teacher)]
            if shapes[0] != shapes[1]:
                found, expected = (f"{shape}" if shape is not None else "none" for shape in reversed(shapes))
                wrong.append(f"{name}: {tensor} is {found}, {first} has {expected}")
    if wrong:
        listed = "\n  ".join(wrong[:20])
        raise PlanError(
            f"the teachers differ from {first}; expected the same tensors. Give models of one shape:\n  {listed}"
            + (f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        )


def _check_classifiers(named: Sequence[tuple[str, Checkpoint]]) -> None:
    """Raise PlanError for teachers of other numbers of classes than the model, and for a model with BatchNorm."""
    (first, source), *others = named
    labels = classes_of(source)
    other = [f"{name} has {count}" for name, x in others if (count := classes_of(x)) != labels]
    if other:
        raise PlanError(
            f"{first} has {labels} classes, and {shorten(other, 5)}; expected as many. Make a model with a head of "
            f"other classes by `mergekit-lfm head {first} --labels N`"
        )
    if any(name.endswith(STATISTICS) for name in source):
        raise PlanError(
            f"{first} has BatchNorm, whose statistics do not follow episodes; expected a model without, as ViT. The "
            "teachers may have it"
        )
