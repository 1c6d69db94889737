"""A model with a bottleneck adapter as a class that needs torch and transformers alone: the text of its module.

The text has the very classes that run here, `Bottleneck` and `Fusion`, so that the two cannot differ.
"""

from __future__ import annotations

from inspect import getsource
from typing import Any

from torch import nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.attach import SUFFIX
from mergekit_lfm.runtime.bottlenecks import Bottleneck, Fusion, join
from mergekit_lfm.runtime.sites import find_sites

FORMS = ("bottleneck", "fusion")
TEXT = '''"""{base} with a bottleneck adapter: load it with `trust_remote_code=True`, after reading this file.

Needs torch and transformers. The places of the modules and their sizes are in the config, under `attachment`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import {base}

ACTIVATIONS = {{"relu": torch.relu, "gelu": nn.functional.gelu}}


{classes}


class {name}({base}):
    """{base} with the modules that the config names."""

    def __init__(self, config, *inputs, **options):
        super().__init__(config, *inputs, **options)
        facts = config.attachment
        form = {{"bottleneck": Bottleneck, "fusion": Fusion}}[facts["form"]]
        for place in facts["places"]:
            module = form(facts["config"], place["width"])
            self.get_submodule(place["module"]).add_module(place["name"], module)
            reads, writes = (self.get_submodule(place[part]) for part in ("reads", "writes"))
            join(module, reads, writes, beside=facts["config"]["beside"])
'''


def write_code(base: str) -> tuple[str, str]:
    """The name of the class for a base class of transformers, and the text of a module with it."""
    name = f"Attached{base}"
    classes = "\n\n".join(getsource(each).strip() + "\n" for each in (Bottleneck, Fusion, join))
    return name, TEXT.format(base=base, name=name, classes=classes.strip())


def describe_places(model: nn.Module, form: str, config: dict[str, Any]) -> dict[str, Any]:
    """The places of the modules in a model, by the names of its own modules, for the config of that class.

    Raises PlanError for a form that the class does not have.
    """
    if form not in FORMS:
        raise PlanError(f"found the form {form!r}, expected {' or '.join(FORMS)}; tune by another method")
    names = {id(module): name for name, module in model.named_modules()}
    places = [
        {
            "module": names[id(site.module)],
            "name": site.place + SUFFIX,
            "width": site.width,
            "reads": names[id(site.reads)],
            "writes": names[id(site.writes)],
        }
        for site in find_sites(model, config["places"])
    ]
    return {"form": form, "config": config, "places": places}
