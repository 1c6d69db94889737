"""ResNet: convolutions with BatchNorm; the layers of a stage add to one skip path, so that a stage is one group.

BatchNorm undoes the scale of a convolution: the factors act on its gain and shift, and the rest follows the order only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from mergekit_lfm.arch.table import Group, Scale, Symmetries, Units, keep_outputs, read_table

MODEL_TYPES = ("resnet",)

# A convolution and its norm: {out} names its units, {read} its inputs.
CONVOLUTION = """
{name}.convolution.weight                  {out}:order  {read}  kernel  kernel
{name}.normalization.weight                {out}
{name}.normalization.bias                  {out}
{name}.normalization.running_mean          {out}:order
{name}.normalization.running_var           {out}:order
{name}.normalization.num_batches_tracked?
"""
HEAD = """
classifier.1.weight?                       class  {last}'
classifier.1.bias?                         class
"""


def symmetries(config: Mapping[str, Any], names: Iterable[str]) -> Symmetries:
    """The table of a model with this config. The last stage of a ResNetModel, which has no head, is its output."""
    names = set(names)
    prefix = "resnet." if any(name.startswith("resnet.") for name in names) else ""
    reduction, between = (4, 2) if config["layer_type"] == "bottleneck" else (1, 1)
    scale: Scale | None = "positive" if config["hidden_act"] == "relu" else None
    groups: dict[str, Group] = {"stem": Units(config["embedding_size"], scale)}
    table = CONVOLUTION.format(name=f"{prefix}embedder.embedder", out="stem", read="input")
    skip = "stem"
    for stage, (width, depth) in enumerate(zip(config["hidden_sizes"], config["depths"], strict=True)):
        for layer in range(depth):
            place = f"stages.{stage}.layers.{layer}"
            name, before = f"{prefix}encoder.{place}", skip
            if f"{name}.shortcut.convolution.weight" in names:
                skip = f"stages.{stage}"
                groups[skip] = Units(width, scale)
                table += CONVOLUTION.format(name=f"{name}.shortcut", out=skip, read=f"{before}'")
            inside = [f"{place}.{i}" for i in range(between)]
            # transformers always uses ReLU within a layer, whatever the config says
            groups |= {group: Units(width // reduction, "positive") for group in inside}
            for i, (read, out) in enumerate(pairwise([before, *inside, skip])):
                table += CONVOLUTION.format(name=f"{name}.layer.{i}", out=out, read=f"{read}'")
    found = read_table(table + HEAD.format(last=skip), groups, names)
    return found if "classifier.1.weight" in names else keep_outputs(found, {skip})
