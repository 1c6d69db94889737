"""What people and scripts read: tables, pages, progress bars, and the same as JSON has it. No torch is imported."""
