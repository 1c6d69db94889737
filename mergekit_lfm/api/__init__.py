"""One function for each workflow: Python users and commands call these."""
