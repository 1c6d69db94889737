"""Attach a small module to a model that is loaded: it becomes a part of the layers, and hooks call it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.attachment import ATTACHMENT, Attachment, refuse_prompts
from mergekit_lfm.errors import FormatError, PlanError, shorten
from mergekit_lfm.runtime.bottlenecks import FORMS, Compact, Config, Rules, join
from mergekit_lfm.runtime.sites import PLACES, find_sites, trunk_of

SHARED = "shared_adapter"  # in the trunk: what the modules of all layers share
SUFFIX = "_adapter"  # ends a module's name in its layer, after the place


@dataclass
class Attached:
    """Modules that run with a model. modules: by their names in the trunk. replaced: the model's own heads."""

    model: nn.Module
    modules: dict[str, nn.Module]
    handles: list[Any] = field(default_factory=list)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Their parameters by the names that a file has."""
        return {f"{at}.{own}": x for at, module in self.modules.items() for own, x in module.named_parameters()}

    @property
    def names(self) -> frozenset[str]:
        """The names of their parameters in the model."""
        own = {id(x) for x in self.parameters.values()}
        return frozenset(name for name, x in self.model.named_parameters() if id(x) in own)

    @torch.no_grad()
    def detach(self) -> None:
        """Take them away: the model is as it was."""
        for handle in self.handles:
            handle.remove()
        trunk = trunk_of(self.model)
        for name in self.modules:
            above, _, last = name.rpartition(".")
            delattr(trunk.get_submodule(above), last)
        for name, old in self.replaced.items():
            self.model.get_parameter(name).copy_(old)


def install(model: nn.Module, form: str, config: Config) -> Attached:
    """New modules of a form at the places of a model that the config names, on its device and in its dtype.

    Raises PlanError as `find_sites` does, and for a model that has an attachment.
    """
    trunk, taken = trunk_of(model), {SHARED, *(place + SUFFIX for place in PLACES)}
    if any(name.rpartition(".")[2] in taken for name, _ in trunk.named_modules()):
        raise PlanError("the model has an attachment, expected none; average them, or give one alone")
    sites = find_sites(model, config["places"])
    made, attached = FORMS[form], Attached(model, {})
    try:
        shared = None if made.shared is None else made.shared(config)
        if shared is not None:
            trunk.add_module(SHARED, shared.to(next(trunk.parameters())))
            attached.modules[SHARED] = shared
        for site in sites:
            module = made.build(config, site.width, shared).to(next(site.writes.parameters()))
            name = site.place + SUFFIX
            site.module.add_module(name, module.train(model.training))
            attached.modules[f"{site.layer}.{name}"] = module
            attached.handles += join(module, site.reads, site.writes, beside=bool(config["beside"]))
    except BaseException:
        attached.detach()
        raise
    return attached


def check_base(attachment: Attachment, content: str, label: object) -> None:
    """Raise FormatError if an attachment belongs to a model of another content, with both."""
    if attachment.info.base != content:
        raise FormatError(
            f"{label} belongs to a model of content {attachment.info.base}, found one of content {content}; give the "
            "model that it was tuned on"
        )


@torch.no_grad()
def attach(model: nn.Module, attachment: Attachment, base: str, label: object = "the attachment") -> Attached:
    """Have an attachment run with a model whose content is `base`; `detach` of the result takes it away.

    A head that it replaces is left out if the model is loaded without any. Raises FormatError for an attachment of
    another model, with both contents, and for tensors that do not fit.
    """
    info = attachment.info
    refuse_prompts(info, label)
    check_base(attachment, base, label)
    try:
        attached = install(model, info.form, info.config)
    except PlanError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{label} has a damaged config ({error!r}); {ATTACHMENT.again}") from None
    places: dict[str, Tensor] = {**attached.parameters}
    headless = trunk_of(model) is model
    heads = {name: x for name, x in model.named_parameters() if name in info.replaced}
    ignored = {*info.replaced} - heads.keys() if headless else set()
    wanted = {**places, **heads}
    found = {name: x for name, x in attachment.tensors.items() if name not in ignored}
    wrong = sorted(wanted.keys() ^ found.keys())
    wrong += [name for name, x in found.items() if name in wanted and x.shape != wanted[name].shape]
    if wrong:
        attached.detach()
        raise FormatError(f"{label} does not fit the model at {shorten(wrong, 3)}; {ATTACHMENT.again}")
    attached.replaced = {name: x.detach().clone() for name, x in heads.items()}
    for name, x in found.items():
        wanted[name].copy_(x)
    return attached


def expand_attachment(attachment: Attachment) -> Attachment:
    """An attachment of plain bottlenecks that does the same as one by `compacter`; any other as it is."""
    info = attachment.info
    if info.form != "compact":
        return attachment
    left, tensors = attachment.tensors[f"{SHARED}.left"], dict[str, Tensor]()
    rules = Rules(info.config).to(left)
    rules.load_state_dict({"left": left})
    for at in sorted({name.rpartition(".")[0] for name in attachment.tensors if name.endswith(".down_bias")}):
        own = {name.removeprefix(f"{at}."): x for name, x in attachment.tensors.items() if name.startswith(f"{at}.")}
        module = Compact(info.config, len(own["up_bias"]), rules).to(left)
        module.load_state_dict(own)
        tensors |= {f"{at}.{name}": x for name, x in module.expanded().items()}
    tensors |= {name: attachment.tensors[name] for name in info.replaced}
    plain = {name: value for name, value in info.config.items() if name not in ("rules", "factor_rank")}
    return Attachment(replace(info, form="bottleneck", config=plain), tensors)
