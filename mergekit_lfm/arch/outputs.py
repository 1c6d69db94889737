"""Units that are a model's outputs: where no head reads the last hidden units, nothing may act on them."""

from __future__ import annotations
