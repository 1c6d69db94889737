"""Output for people and scripts: tables, pages, progress bars, and the same as JSON data. Imports no torch."""
