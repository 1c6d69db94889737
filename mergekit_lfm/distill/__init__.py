"""Distillation: students that learn from teachers, with data or with none."""
