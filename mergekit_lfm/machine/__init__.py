"""What this machine offers: memory, cores, disk, devices."""
