"""Carry a plan out: tasks, workers, and the documents beside the weights."""
