"""Saved models as tensors by name: files, folders, the Hub; read by ranges, written durably."""
