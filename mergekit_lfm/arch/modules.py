"""The modules of models of several parts, by the names of their tensors.

A module is named as its tensors begin (`model.visual`, `encoder`), or by one of the words that recipes use for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

# The words for a module, and the parts of names that tensors of it have among their first three.
WORDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("vision_tower", "vision_model", "vision_encoder", "visual", "vision"),
        ("vision_tower", "vision_model", "vision_encoder", "visual", "vision", "vit", "image_encoder", "vpm"),
    ),
    (
        ("multi_modal_projector", "mm_projector", "projector", "connector"),
        ("multi_modal_projector", "mm_projector", "projector", "connector", "mlp1", "resampler", "image_newline"),
    ),
    (
        ("audio_tower", "audio_model", "audio_encoder", "audio"),
        ("audio_tower", "audio_model", "audio_encoder", "embed_audio"),
    ),
    (("encoder",), ("encoder",)),
    (("decoder",), ("decoder",)),
)
TEXT = ("text_decoder", "language_model", "text_model", "llm")  # all that the other towers do not have
REST = "default"  # all that the other modules of the recipe do not have
DEPTH = 3  # parts of a name in which the word for a module is looked for


def find_modules(wanted: Sequence[str], names: Iterable[str]) -> dict[str, dict[str, None]]:
    """The names of the tensors of each wanted module, the longest beginning first; empty for one that nothing fits."""
    found: dict[str, dict[str, None]] = {module: {} for module in wanted}
    names = list(names)
    prefixes = [module for module in wanted if any(_begins(name, module) for name in names)]
    words = {module: _words_of(module) for module in wanted if module not in prefixes}
    for name in names:
        begun = max((module for module in prefixes if _begins(name, module)), key=len, default=None)
        module = begun or next((each for each, parts in words.items() if _has(name, parts)), None)
        module = module or next((each for each in words if each in TEXT and not _in_tower(name)), None)
        module = module or (REST if REST in words else None)
        if module is not None:
            found[module][name] = None
    return found


def beginnings(names: Iterable[str], layers: Mapping[str, object]) -> list[str]:
    """The beginnings by which a model's modules can be named: what its tensors outside a layer's number begin with."""
    return list(dict.fromkeys(".".join(name.split(".")[: 2 if name in layers else 1]) for name in names))


def _begins(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _words_of(module: str) -> tuple[str, ...]:
    return next((parts for words, parts in WORDS if module in words), ())


def _has(name: str, parts: Sequence[str]) -> bool:
    return any(part in parts for part in name.split(".")[:DEPTH])


def _in_tower(name: str) -> bool:
    """True for a tensor of something other than the text."""
    return any(_has(name, parts) for words, parts in WORDS[:3])
