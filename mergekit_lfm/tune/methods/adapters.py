"""Tuning by PEFT's adapters: LoRA and its relatives, whose changes can be merged into the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mergekit_lfm.tune.work import Prepared, TuneWork

LINEAR = ("Linear", "Conv1D")  # names of classes

RANK = Parameter("rank", 8, kind="int", minimum=1, doc="rank of the change of each matrix")
ALPHA = Parameter("alpha", 16.0, above=0, doc="the change is scaled by alpha over rank")
DROPOUT = Parameter("dropout", 0.0, minimum=0, maximum=0.99, doc="share of a layer's inputs that training drops")
TARGETS = Parameter(
    "targets",
    "all-linear",
    kind="str",
    doc="names of the modules to change, with commas, or all-linear: all but heads and experts",
)


def _prepare(make: Callable[[Any, Mapping[str, Any]], Any]) -> Callable[[TuneWork], Prepared]:
    """A method by its config. make(peft, options): the config of PEFT, without the task and the base."""

    def prepare(work: TuneWork) -> Prepared:
        """The model with a new adapter, as PEFT makes it."""
        from mergekit_lfm.tune.peft_models import attach, save_of
        from mergekit_lfm.tune.work import Prepared

        _check_rank(work)
        options: dict[str, Any] = {**work.options, "targets": _targets(work), "tasks": len(work.tasks)}
        model = attach(work, lambda peft: make(peft, options), "names of its modules in `targets`")
        return Prepared(model, adapter=save_of(model, work))

    return prepare


def routed(work: TuneWork) -> Prepared:
    """Skills that all tasks share, weighed for each task and head. Source: Caccia et al. 2022, arXiv 2211.03831.

    The development set is judged with all skills alike, as the adapter for a task to come has them. All linear layers
    are those of numbered layers, since PEFT routes states of tokens alone, which a pooler does not read.
    """
    from dataclasses import replace

    from mergekit_lfm.train.hooks import Rates
    from mergekit_lfm.tune.routing import begin_evenly, collapse
    from mergekit_lfm.tune.work import NUMBER

    if work.task == "embedding":
        raise PlanError("mhr needs a task for each text, which pairs have not; expected lm or classification")
    if work.options["targets"] == "all-linear":
        linear = [n for n, each in work.model.named_modules() if type(each).__name__ in LINEAR and NUMBER.search(n)]
        work = replace(work, options={**work.options, "targets": ",".join(linear)})
    prepared = _prepare(_poly)(work)
    heads, factor = work.options["heads"], work.options["routing_rate"]
    assert isinstance(heads, int) and isinstance(factor, float)
    begin_evenly(prepared.model, heads)
    peft = import_extra("peft", "tuning an adapter", "tune")
    weights = [name for name, _ in prepared.model.named_parameters() if name.endswith(".module_logits")]
    hooks = (Rates(dict.fromkeys(weights, factor)),)
    return replace(prepared, hooks=hooks, decays=False, adapter=lambda: collapse(peft, prepared.model, work))


def _check_rank(work: TuneWork) -> None:
    """Raise PlanError for a rank that no matrix has."""
    largest = max((min(x.shape) for x in work.model.parameters() if x.ndim == 2), default=1)
    rank = work.options.get("rank", 1)
    if isinstance(rank, int) and rank > largest:
        raise PlanError(f"rank is {rank}; expected at most {largest}, the largest that a matrix of this model has")


def _targets(work: TuneWork) -> list[str]:
    """The modules to change, as PEFT takes them. Raises PlanError for no names."""
    text = str(work.options["targets"])
    modules = dict(work.model.named_modules())
    if text == "all-linear":
        return _linear_layers(work)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text == "norms":
        names = sorted({name.rpartition(".")[2] for name, each in modules.items() if "Norm" in type(each).__name__})
    if not names:
        raise PlanError(f"targets: found {text!r}, expected names of modules with commas, such as q_proj,v_proj")
    return names


def _linear_layers(work: TuneWork) -> list[str]:
    """The last names of all linear layers but heads; whole names where something else has that last name.

    PEFT's own all-linear wraps experts in one tensor, too, in a form that few programs read.
    """
    heads = {id(each) for each in work.parameters(work.head)} | work.embedded
    linear, others = list[str](), set[str]()
    for name, module in work.model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ in LINEAR and id(weight) not in heads:
            linear.append(name)
        else:
            others.add(name.rpartition(".")[2])
    return sorted({name if (last := name.rpartition(".")[2]) in others else last for name in linear})


def _lora(peft: Any, options: Mapping[str, Any], **more: Any) -> Any:
    return peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=options["targets"],
        **more,
    )


def _dora(peft: Any, options: Mapping[str, Any]) -> Any:
    return _lora(peft, options, use_dora=True)


def _lokr(peft: Any, options: Mapping[str, Any]) -> Any:
    return peft.LoKrConfig(r=options["rank"], alpha=options["alpha"], target_modules=options["targets"])


def _ia3(peft: Any, options: Mapping[str, Any]) -> Any:
    return peft.IA3Config(target_modules=options["targets"], feedforward_modules=[])


def _ln(peft: Any, options: Mapping[str, Any]) -> Any:
    return peft.LNTuningConfig(target_modules=options["targets"])


def _poly(peft: Any, options: Mapping[str, Any]) -> Any:
    return peft.PolyConfig(
        r=options["rank"],
        n_tasks=options["tasks"] + 1,
        n_skills=options["skills"],
        n_splits=options["heads"],
        target_modules=options["targets"],
    )


METHODS = (
    TuneMethod(
        "lora",
        "Hu et al. 2021, arXiv 2106.09685",
        "a change of low rank for each matrix, as an adapter",
        "adapter",
        _prepare(_lora),
        2e-4,
        (RANK, ALPHA, DROPOUT, TARGETS),
    ),
    TuneMethod(
        "dora",
        "Liu et al. 2024, arXiv 2402.09353",
        "a change of low rank for the direction of each row of a matrix, and one of its length, as an adapter",
        "adapter",
        _prepare(_dora),
        2e-4,
        (RANK, ALPHA, DROPOUT, TARGETS),
    ),
    TuneMethod(
        "lokr",
        "Yeh et al. 2023, arXiv 2309.14859",
        "a Kronecker product as the change of each matrix, as an adapter",
        "adapter",
        _prepare(_lokr),
        1e-3,
        (RANK, ALPHA, TARGETS),
    ),
    TuneMethod(
        "ia3",
        "Liu et al. 2022, arXiv 2205.05638",
        "one factor for each output of a layer, as an adapter",
        "adapter",
        _prepare(_ia3),
        3e-3,
        (TARGETS,),
    ),
    TuneMethod(
        "ln",
        "Zhao et al. 2023, arXiv 2312.11420",
        "the layers that normalise alone, as an adapter",
        "adapter",
        _prepare(_ln),
        1e-3,
        (Parameter("targets", "norms", kind="str", doc="names of the modules, with commas, or norms for all of them"),),
    ),
    TuneMethod(
        "mhr",
        "Caccia et al. 2022, arXiv 2211.03831",
        "changes of low rank that all data files share, weighed for each file and block of a matrix, as adapters",
        "adapter",
        routed,
        1e-3,
        (
            RANK,
            Parameter("skills", 4, kind="int", minimum=1, doc="changes of low rank that the files share"),
            Parameter("heads", 4, kind="int", minimum=1, doc="blocks of a matrix with weights of their own"),
            Parameter("routing_rate", 100.0, above=0, doc="rate of the weights, as a factor of the learning rate"),
            TARGETS,
        ),
        tasks=True,
    ),
)
