"""Alignment: transforms that bring one model near another."""
