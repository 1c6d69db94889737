"""Describe this machine: memory, cores, disk, devices; and what may be shown on it."""
