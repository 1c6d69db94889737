"""What a model is worth: scores, barriers, sameness."""
