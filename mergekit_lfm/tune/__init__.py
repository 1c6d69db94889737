"""Ways to tune a model: which of its parameters are trained, when, and what is left of that."""
