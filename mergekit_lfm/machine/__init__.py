"""Describe this machine: memory, cores, disk, devices."""
