"""Meta-learning: initialisations from which few steps on few examples lead to a good model."""
