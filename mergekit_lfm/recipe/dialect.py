"""Keys of published recipes without an effect here: read with a notice for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_lfm.methods.registry import METHODS

# Keys that mergekit does not read, or that are about how it runs, and what to know about them.
UNUSED = {
    "int8_mask": "masks take no memory to speak of",
    "random_seed": "mergekit does not read it; `seed` seeds random methods",
    "embed_slerp": "rows of the vocabulary are merged as all other tensors are",
    "name": "it is for later stages of a recipe, and this one has one",
    "rescale": "it belongs under `parameters`",
    "lazy_unpickle": "checkpoints are always read tensor by tensor",
    "low_cpu_memory": "give --memory",
    "allow_crimes": "give `allow` or `rename`, as messages say",
    "trust_remote_code": "a model's code never runs",
    "copy_tokenizer": "the tokenizer is always copied",
    "out_shard_size": "give --max-shard-size",
    "cuda": "give `device: cuda`",
}
DEAD = "residual_weight"  # a key of a slice


def read_dialect(data: Mapping[str, Any], known: Mapping[str, object]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The recipe without keys that have no effect, and the notices. known: our keys."""
    ours, notices = dict(data), list[str]()
    parameters = {parameter.name for method in METHODS.values() for parameter in method.parameters}
    for name in [name for name in ours if name not in known and (name in UNUSED or name in parameters)]:
        why = UNUSED.get(name, "it belongs under `parameters`")
        notices.append(f"`{name}` at the top level has no effect here: {why}")
        del ours[name]
    if isinstance(slices := ours.get("slices"), list):
        dead = [i for i, each in enumerate(slices) if isinstance(each, Mapping) and DEAD in each]
        notices += [f"slices[{i}].{DEAD} has no effect here: mergekit does not read it" for i in dead]
        ours["slices"] = [
            {key: value for key, value in each.items() if key != DEAD} if i in dead else each
            for i, each in enumerate(slices)
        ]
    return ours, tuple(notices)
