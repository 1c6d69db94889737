"""Checkpoints made from others while they are read: rewritten, patched, or still pending."""
