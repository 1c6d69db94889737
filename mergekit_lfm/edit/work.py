"""The model while it is edited: its layers, statistics and the changes made so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.facts import BLANK, Fact
from mergekit_lfm.edit.prompts import fill_template
from mergekit_lfm.edit.sites import Site
from mergekit_lfm.edit.targets import EditedModel
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.methods.kinds import EditMethod

CPU = torch.device("cpu")


@dataclass(frozen=True)
class EditWork:
    """The input of an editing method. moments: one matrix [in, in] for each site."""

    subject: EditedModel
    sites: Sequence[Site]
    moments: Sequence[Tensor]
    options: Mapping[str, Any]
    dtype: torch.dtype
    progress: Count | None

    @property
    def device(self) -> torch.device:
        """The device of the solves: the model's GPU, else the CPU, since other devices may lack float64."""
        device = self.subject.device
        return device if device.type == "cuda" else CPU

    @property
    def templates(self) -> list[list[str]]:
        """The contexts by kind: the lists in the option if it has any, else the bare prompt and the others."""
        templates = self.options["context_templates"]
        if any(isinstance(entry, list) for entry in templates):
            return [entry if isinstance(entry, list) else [entry] for entry in templates]
        others = [template for template in templates if template != BLANK]
        return [kind for kind in ([BLANK], others) if kind]

    @property
    def contexts(self) -> list[str]:
        """All contexts, the bare prompt first: the search and the changes start from its state."""
        return sorted((each for kind in self.templates for each in kind), key=lambda template: template != BLANK)

    def states(self, facts: Sequence[Fact], templates: Sequence[str], module: nn.Module, *, inputs: bool) -> Tensor:
        """The module's output or input at the subjects in these contexts, [facts, templates, width], for the solves."""
        prompts = [fill_template(template, fact.prompt, fact.subject) for fact in facts for template in templates]
        rows = self.options["batch"] * (len(self.contexts) + 1)
        (states,) = self.subject.at_subject(self.subject.encode(prompts), [module], inputs=inputs, rows=rows)
        return states.reshape(len(facts), len(templates), -1).to(self.device, self.dtype)

    def keys(self, facts: Sequence[Fact], site: Site) -> Tensor:
        """The site's inputs at the subjects: the mean over kinds of contexts of the mean within each, [facts, in]."""
        kinds = [self.states(facts, kind, site.projection, inputs=True).mean(1) for kind in self.templates]
        return torch.stack(kinds).mean(0)


Changes = list[tuple[Tensor, Tensor]]  # for each site (left [out, n], right [n, in])
Editor = EditMethod[Callable[[EditWork, Sequence[Fact]], Changes]]


def add_change(site: Site, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the site's weight, in place."""
    weight = site.parameter
    change = site.as_stored(left @ right).to(weight.device)
    weight.copy_((weight.to(left.dtype) + change).to(weight.dtype))


@contextmanager
def restore_weights(sites: Sequence[Site]) -> Iterator[None]:
    """Put the sites' weights back at the end of the context, bit for bit."""
    before = [site.parameter.detach().clone() for site in sites]
    try:
        yield
    finally:
        with torch.no_grad():
            for site, weight in zip(sites, before, strict=True):
                site.parameter.copy_(weight)
