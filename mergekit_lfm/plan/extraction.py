"""Plan an adapter from two models' headers: which tensors become products, and which modules it has whole.

Names are those that the model has when it runs, as PEFT needs them. Every tensor has one place: in a group, in a module
that can be saved, among the biases, or among those that no adapter can hold, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mergekit_lfm.arch.heads import HEAD, POOLER
from mergekit_lfm.arch.kinds import kind_of
from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.output.adapter_config import HEADS, modules_of, saved_with
from mergekit_lfm.plan.groups import Group, Selection, find_groups, is_vocabulary
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.experts import regroup
from mergekit_lfm.views.renamed import Renamed
from mergekit_lfm.views.renaming import find_renaming

# Running models whose files on the Hub have names without the module that the class with a head adds.
TRUNKS = {"gpt2": "transformer.", "bloom": "transformer."}
TIED_OTHERWISE = ("ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
EXCLUDED = "excluded"
PARTIAL = "PEFT saves whole modules, and its own has others in it"


@dataclass
class Extraction:
    """The plan. model, base: with the same names and layout. names: by a tensor's name there that of the running model.

    groups: the products. modules: by PEFT's name those that can be saved, with their tensors. biases: of the layers in
    groups. lost: the tensors that no adapter can hold, and why. added: those that the model alone has.
    together: by the names of one expert's tensors those of the tensors with all experts.
    """

    model: Checkpoint
    base: Checkpoint
    names: Mapping[str, str]
    groups: list[Group] = field(default_factory=list)
    modules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    together: dict[str, str] = field(default_factory=dict)

    @property
    def turned(self) -> bool:
        """Whether layers are Conv1D."""
        return any(group.turned for group in self.groups if group.kind == "layer")

    @cached_property
    def tied(self) -> tuple[str, str] | None:
        """The modules of the embedding and of the head that has its weight, where PEFT keeps the two alike."""
        architecture = str(next(iter(self.model.config.get("architectures") or [""]), ""))
        if not is_tied(self.model.config) or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return None
        groups = tied_names({**dict.fromkeys(self.names.values()), "lm_head.weight": None})
        group = next((group for group in groups if group[-1] == "lm_head.weight"), None)
        return None if group is None else (group[0].removesuffix(".weight"), "lm_head")

    def copies(self, module: str) -> int:
        """How often the adapter has a module's tensors: those of an embedding also for the head that is tied to it."""
        return 2 if self.tied and self.tied[0] == module else 1

    @property
    def unties(self) -> bool:
        """Whether PEFT would give the head of the model an embedding of its own: it ties `lm_head` alone."""
        architecture = str(next(iter(self.model.config.get("architectures") or [""]), ""))
        return bool(is_tied(self.model.config)) and architecture.endswith(TIED_OTHERWISE)

    @property
    def compared(self) -> list[str]:
        """The tensors that are in no group."""
        return list(dict.fromkeys([*self.biases, *self.lost, *(name for own in self.modules.values() for name in own)]))

    @property
    def running(self) -> list[str]:
        """The names of all tensors of the running model."""
        return list(dict.fromkeys(self.together.get(name, running) for name, running in self.names.items()))

    def save_with(self, wanted: Collection[str]) -> set[str]:
        """These modules and those that PEFT must save with them, as far as they can be saved."""
        return {*wanted, *(saved_with(wanted, modules_of(self.running)) & self.modules.keys())}


def plan_extraction(model: Checkpoint, base: Checkpoint, labels: tuple[str, str], selection: Selection) -> Extraction:
    """Find the place of every tensor. labels: of the model and the base in messages.

    Raises PlanError if the two do not have the same tensors in the same shapes, but for heads.
    """
    base = regroup(base, model)
    tied = _tied(model, base)
    if model.keys() != base.keys() and (rules := find_renaming(base, model, lambda name: _is_apart(name, tied))):
        base = Renamed(base, rules)
    counted = [name for name, spec in model.items() if kind_of(spec) != "constant" and name not in tied]
    added = _compare(model, base, counted, labels, tied, selection)
    names = dict(zip(counted, _running_names(counted, model), strict=True))
    plan = Extraction(model, base, names, added=frozenset(added))
    _place(plan, selection)
    return plan


def _tied(model: Checkpoint, base: Checkpoint) -> set[str]:
    """The names that stand for another tensor."""
    if not is_tied(model.config):
        return set()
    return {name for group in tied_names({**base, **model}) for name in group[1:]}


def _is_apart(name: str, tied: Collection[str]) -> bool:
    """Whether one of two models may have a tensor alone."""
    spec = TensorSpec(name, (), "float32")
    return name in tied or bool(HEAD.search(name) or POOLER.search(name)) or kind_of(spec) == "constant"


def _compare(
    model: Checkpoint,
    base: Checkpoint,
    counted: Sequence[str],
    labels: tuple[str, str],
    tied: Collection[str],
    selection: Selection,
) -> Iterator[str]:
    """The tensors that the model alone has, or in another shape: of heads, or excluded. Raises PlanError for others."""
    label, base_label = labels
    problems = []
    for name in counted:
        spec, old = model[name], base.get(name)
        if old is not None and old.shape == spec.shape:
            continue
        free = (HEAD.search(name) and not is_vocabulary(name)) or (old is None and POOLER.search(name))
        if free or not selection.takes(name):
            yield name
        elif old is None:
            problems.append(f"{spec} is in {label} alone")
        else:
            problems.append(f"{name} is {list(spec.shape)} in {label}, {list(old.shape)} in {base_label}")
    alone = (spec for name, spec in base.items() if name not in model and not _is_apart(name, tied))
    problems += [f"{spec} is in {base_label} alone" for spec in alone if selection.takes(spec.name)]
    if problems:
        found = several(f"an adapter changes values, but {label} and {base_label} differ in more", problems, most=10)
        raise PlanError(f"{found}\nGive the model that was fine-tuned, resized as it was, as the base")


def _running_names(names: Sequence[str], model: Checkpoint) -> list[str]:
    """The names as the class has them that the config names."""
    kind = str(model.config.get("model_type", ""))
    architecture = next(iter(model.config.get("architectures") or [""]), "")
    headed = re.search(r"(For\w+|LMHeadModel|DoubleHeadsModel)$", str(architecture))
    trunk = TRUNKS.get(kind, "") if headed else ""
    if any(name.startswith(trunk) for name in names):
        trunk = ""
    running = [name if HEAD.search(name) else trunk + name for name in names]
    return [re.sub(r"LayerNorm\.(gamma|beta)$", _norm, name.replace(".block_sparse_moe.", ".mlp.")) for name in running]


def _norm(match: re.Match[str]) -> str:
    return "LayerNorm." + ("weight" if match[1] == "gamma" else "bias")


def _place(plan: Extraction, selection: Selection) -> None:
    """Put every tensor into its place."""
    inside: dict[str, list[str]] = {}
    for name, running in plan.names.items():
        for module in _parents(running):
            inside.setdefault(module, []).append(name)
    placed, weights = set[str](), set[str]()
    specs = {running: plan.model[name] for name, running in plan.names.items() if name not in plan.added}
    for group in find_groups(specs, str(plan.model.config.get("model_type", "")), selection):
        placed.update(group.names)
        weights.add(group.name)
        if group.kind == "experts":
            plan.together |= dict.fromkeys(group.names, group.module)
        if selection.takes(group.name):
            plan.groups.append(group)
        else:
            plan.lost |= dict.fromkeys(group.names, EXCLUDED)
    for name, running in plan.names.items():
        if name in placed:
            continue
        module, _, leaf = running.rpartition(".")
        home = _home(running)
        own = inside.get(home, [])
        if not selection.takes(running):
            plan.lost[name] = EXCLUDED
        elif leaf == "bias" and f"{module}.weight" in weights:
            plan.biases.append(name)
        elif own and (home != module or all(plan.names[each].rpartition(".")[0] == module for each in own)):
            plan.modules[home] = tuple(own)
        else:
            plan.lost[name] = PARTIAL


def _home(running: str) -> str:
    """The module that a tensor is saved with: a whole head, or its own."""
    return next((each for each in _parents(running) if each.rpartition(".")[2] in HEADS), running.rpartition(".")[0])


def _parents(name: str) -> list[str]:
    """The modules that a tensor is in, from the model's own down."""
    return [name[:i] for i, char in enumerate(name) if char == "."]
