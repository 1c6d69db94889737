"""Checkpoints made from others while they are read: rewritten, patched, with adapters, or still pending."""
