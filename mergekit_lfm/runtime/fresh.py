"""Models of random weights, as their classes in transformers draw them, from a config alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.load import reading

if TYPE_CHECKING:
    from torch import Tensor


def fresh_tensors(config: Mapping[str, Any], folder: Path, seed: int, *, empty: bool = False) -> dict[str, Tensor]:
    """The tensors of a model of random weights by their names, each once, in the config's dtype.

    config: of config.json, which names the class; folder: where it is. empty: on the meta device, without values.
    Raises PlanError for the config of a quantised model, FormatError for one that transformers has no class for.
    """
    import torch

    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        raise PlanError(
            f"{folder} is quantised ({method}), expected a config without; give the model that it was made of"
        )
    device = torch.device("meta" if empty else "cpu")
    with reading(folder, "embedding") as transformers, torch.random.fork_rng([]), device:
        made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        kind = getattr(transformers, next(iter(made.architectures or []), ""), None)
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(made) if kind is None else kind(made)
        model = model.to(made.dtype or torch.float32)
    first = dict[int, str]()  # of tied tensors, which are one
    for name, x in model.state_dict(keep_vars=True).items():
        first.setdefault(id(x), name)
    tensors = model.state_dict()
    return {name: tensors[name] for name in first.values()}
