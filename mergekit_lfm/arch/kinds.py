"""The kinds of tensors, by their names: parameters, and buffers that are merged in other ways."""

from __future__ import annotations

import re
from typing import Literal

from mergekit_lfm.store.tensors import FLOATS, TensorSpec

Kind = Literal["parameter", "statistic", "counter", "constant"]

STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")  # of batch normalisation: they describe data
COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|num_updates)$")  # of steps of training
# Loaders compute them from the config, so that no model's values count: frequencies, positions, masks (but for those of
# pruned weights), the window of relative positions, and the noise schedules in Stable Diffusion's files.
CONSTANTS = re.compile(
    r"inv_freq$|(^|[._])masked_bias$|\.attn\.bias$|(^|\.)position_ids$|(^|\.)relative_position_index$"
    r"|(^|[._])(?<!weight_)(?<!bias_)mask$|(^|\.)tril$"
    r"|^(betas|alphas_cumprod(_prev)?|(sqrt|log)_\w*alphas_cumprod|posterior_\w+)$"
)


def kind_of(spec: TensorSpec) -> Kind:
    """The kind of a tensor. Batch normalisation counts in whole numbers; a float of that name is a parameter."""
    if STATISTICS.search(spec.name) and spec.dtype in FLOATS:
        return "statistic"
    if COUNTERS.search(spec.name) and spec.dtype not in FLOATS:
        return "counter"
    return "constant" if CONSTANTS.search(spec.name) else "parameter"
