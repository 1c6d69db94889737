"""Alignment: transforms that bring one model near another, from weights or from statistics of both on the same data."""
