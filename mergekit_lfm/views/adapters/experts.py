"""LoRA of the experts of a layer, which the running model has in tensors of three axes, and files expert by expert.

PEFT wraps a module once for each such tensor, in the order in which the module has them: the innermost wrapper is that
of the first. Source: peft 0.21, tuners/lora/layer.py, ParamWrapper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mergekit_lfm.arch.experts import ORDER, PART, Form, Layout, layouts
from mergekit_lfm.arch.experts import Experts as Layer
from mergekit_lfm.artifacts.adapter import Adapter, Module
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.adapters.change import Change
from mergekit_lfm.views.adapters.kinds import find_halves
from mergekit_lfm.views.adapters.lora import Expert, Experts, LowRank
from mergekit_lfm.views.adapters.names import is_experts

if TYPE_CHECKING:
    from mergekit_lfm.views.adapters.finding import Finding

TURNED = ("gpt_oss", "llama4", "llama4_text")  # the models that have them as [experts, in, out]


Apart = Mapping[str, tuple[Layout, Layer, tuple[int, ...]]]  # by the name of a tensor of all: which matrices are in it


def expert_changes(finding: Finding) -> Iterator[tuple[str, Change]]:
    """The changes of the experts of all layers."""
    wrappers: dict[str, list[Module]] = {}
    for module in finding.adapter.modules:
        if is_experts(module):
            wrappers.setdefault(module.name, []).append(module)
    apart = _find_apart(finding.model) if wrappers else {}
    for name, modules in wrappers.items():
        parameters = parameters_of(finding.adapter, name)
        modules.sort(key=lambda module: -module.depth)
        if len(parameters) != len(modules):
            found = ", ".join(parameters) or "none"
            text = f"it has {len(modules)} pairs of matrices, and target_parameters names {found} of its tensors"
            finding.refuse(modules[0], text)
            continue
        for module, parameter in zip(modules, parameters, strict=True):
            yield from _change(finding, module, parameter, apart)


def _find_apart(model: Mapping[str, TensorSpec]) -> Apart:
    """The experts that the model has one by one."""
    own = {name: spec for name, spec in model.items() if PART in name}
    found: dict[str, tuple[Layout, Layer, tuple[int, ...]]] = {}
    for layout in layouts():
        for layer in (each for each in layout.find(own) if each.form == "apart"):
            gate_up, down = layout.together(layer)
            found |= {gate_up: (layout, layer, (0, 1)), down: (layout, layer, (2,))}
    return found


def parameters_of(adapter: Adapter, module: str) -> list[str]:
    """The tensors of a module that the config names, in the order in which the module has them."""
    stated = adapter.config.get("target_parameters") or ()
    own = {each.rpartition(".")[2] for each in stated if f".{module}.".endswith(f".{each.rpartition('.')[0]}.")}
    return [*(name for name in ORDER if name in own), *sorted(own - {*ORDER})]


def _change(finding: Finding, module: Module, parameter: str, apart: Apart) -> Iterator[tuple[str, Change]]:
    """The changes of one tensor of all experts, or of the tensors of each that it stands for."""
    if module.parts.keys() != {"lora_A", "lora_B"} or finding.adapter.config.get("use_dora"):
        dora = ", use_dora is set" if finding.adapter.config.get("use_dora") else ""
        finding.refuse(module, f"{parameter} has {', '.join(module.parts)}{dora}; expected lora_A and lora_B of a LoRA")
        return
    halves = find_halves(finding, module)
    if halves is None:
        return
    a, b, name = *halves, f"{module.name}.{parameter}"
    stored = finding.model.get(name)
    if stored is not None:
        count, form = stored.shape[0] if stored.shape else 0, _form(finding.model_type, stored, a, b)
        fits = form is not None
    else:
        layout, layer, matrices = apart.get(name, (None, None, ()))
        shapes = [] if layer is None else [layer.matrices[matrix] for matrix in matrices]
        count, form = 0 if layer is None else layer.count, None
        fits = bool(shapes) and (sum(rows for rows, _ in shapes), shapes[0][1]) == (b.shape[0], a.shape[1])
    if not fits or a.shape[0] % count or b.shape[1:] != a.shape[:1]:
        finding.refuse(module, f"{parameter}: lora_A {list(a.shape)} and lora_B {list(b.shape)} fit no experts there")
        return
    scale = finding.scale(module, name, finding.rank(module, name, a.shape[0] // count))
    if form is not None:
        yield name, Experts(a, b, scale, count, form == "turned")
        return
    assert layout is not None and layer is not None
    for e in range(count):
        for matrix in matrices:
            rows = layer.matrices[matrix][0]
            one = Expert(e, count, rows if matrix == 1 else 0, rows)
            yield layout.name(layer, e, matrix), LowRank(a, b, scale, False, one)


def _form(model_type: str, stored: TensorSpec, a: TensorSpec, b: TensorSpec) -> Form | None:
    """How a tensor of all experts stores what a pair of matrices changes; None if they do not fit it."""
    out, columns = b.shape[0], a.shape[1]
    if stored.shape[1:] == (out, columns) and (out != columns or model_type not in TURNED):
        return "together"
    return "turned" if stored.shape[1:] == (columns, out) else None
