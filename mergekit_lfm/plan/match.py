"""Match tensors across models, list those dropped, and report all misfits in one message."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.store.checkpoint import Checkpoint

# Buffers that loaders compute from the config: integers that only some checkpoints of a model carry, and floats that
# are not parameters and are therefore not merged either.
RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias|\.attn\.bias|embeddings\.position_ids)$")
CONSTANTS = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias)$")
HEAD_NAME = "lm_head.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")


def match_tensors(
    models: Sequence[Checkpoint], labels: Sequence[str], template: int
) -> tuple[dict[str, dict[int, str]], tuple[tuple[str, str, str], ...]]:
    """For each output tensor the name of its source in every model; and the dropped (model, tensor, reason).

    Raises PlanError for tensors that only some models have, except buffers that loaders recompute and tied heads.
    """
    first = models[template]
    names: dict[str, dict[int, str]] = {name: {} for name in first}
    templates = {name for name in first if _is_templates(name, models)}
    dropped: list[tuple[str, str, str]] = []
    missing: list[str] = []
    extra: list[str] = []
    for i, (model, label) in enumerate(zip(models, labels, strict=True)):
        embedding = next((e for e in EMBEDDINGS if e in model), None)
        tied = bool(model.config.get("tie_word_embeddings"))
        left: dict[str, str] = {}
        dropped += [(label, name, why) for name, why in model.dropped.items()]
        for name in first:
            if name in templates and i != template:
                if name in model:
                    dropped.append(
                        (label, model.name_in_files(name), "a buffer that loaders recompute; the template's is kept")
                    )
            elif name in model:
                names[name][i] = name
            elif name == HEAD_NAME and tied and embedding:
                names[name][i] = embedding
            else:
                missing.append(f"{label} lacks {first[name]}, which {labels[template]} has")
        for name in (name for name in model if name not in names):
            if RECOMPUTED.search(name):
                dropped.append(
                    (label, model.name_in_files(name), "a buffer that loaders recompute, which the template lacks")
                )
            elif name == HEAD_NAME and tied:
                left[name] = "tied to the embedding by the model's config"
            else:
                extra.append(f"{label} has {model[name]}, which {labels[template]} lacks")
        dropped += [(label, model.name_in_files(name), why) for name, why in left.items()]
        if HEAD_NAME in first and HEAD_NAME in model and first.config.get("tie_word_embeddings") and not tied:
            extra.append(
                f"{label} has a {HEAD_NAME} of its own, but the config of {labels[template]} ties it to the embedding, "
                "so loaders would not use the merged head: choose an untied model as the base"
            )
    problems = missing + extra + _list_misshapen(models, labels, template, names)
    if problems:
        found, cure = several("the checkpoints differ", problems), "Merge models of one architecture and vocabulary."
        raise PlanError("{found}\n{cure}", found=found, cure=cure)
    return names, tuple(dropped)


def _is_templates(name: str, models: Sequence[Checkpoint]) -> bool:
    """True if the template's tensor is kept whatever the others have."""
    everywhere = all(name in model for model in models)
    return bool(RECOMPUTED.search(name)) and (not everywhere or bool(CONSTANTS.search(name)))


def _list_misshapen(
    models: Sequence[Checkpoint], labels: Sequence[str], template: int, names: Mapping[str, Mapping[int, str]]
) -> list[str]:
    first = models[template]
    return [
        f"{name} is {list(models[i][source].shape)} in {labels[i]}, {list(first[name].shape)} in {labels[template]}"
        for name, sources in names.items()
        for i, source in sources.items()
        if models[i][source].shape != first[name].shape
    ]


def layers_of(model: Checkpoint) -> dict[str, tuple[int, int]]:
    """(layer index, layer count) of each tensor in a layer: the first integer of its name, counted per prefix."""
    matches = {name: match for name in model if (match := re.match(r"(.*?(?:^|\.))(\d+)(?:\.|$)", name))}
    counts: dict[str, int] = {}
    for match in matches.values():
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return {name: (int(match[2]), counts[match[1]]) for name, match in matches.items()}
