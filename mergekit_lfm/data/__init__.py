"""Data as models take them: batches from files, or from Python objects."""

from mergekit_lfm.data.batches import Batch, as_batches, digest_of
from mergekit_lfm.data.files import read_data, read_documents, read_pairs

__all__ = ["Batch", "as_batches", "digest_of", "read_data", "read_documents", "read_pairs"]
