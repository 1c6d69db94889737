"""Units that are a model's outputs: if no head reads the last hidden units, no group may act on them."""

from __future__ import annotations
