"""The aligners by name: those of `ALIGN_METHODS`, where each has its entry."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mergekit_lfm.align.activations import match_activations
from mergekit_lfm.align.request import Aligner
from mergekit_lfm.align.transport import transport_units
from mergekit_lfm.align.weights import match_rotations, match_weights

ALIGNERS: Mapping[str, Aligner] = MappingProxyType(
    {
        "weight_matching": match_weights,
        "activation_matching": match_activations,
        "ot": transport_units,
        "rotation": match_rotations,
    }
)
