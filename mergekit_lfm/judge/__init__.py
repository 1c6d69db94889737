"""Judges of models: scores on data, barriers between models, sameness of outputs."""
