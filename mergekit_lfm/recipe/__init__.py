"""The recipe as a user writes it, checked without torch."""
