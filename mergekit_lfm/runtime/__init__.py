"""Models that run: loading, data, batches, hooks. Below this room nothing imports transformers."""
