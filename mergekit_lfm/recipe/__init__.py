"""What a user writes, checked without torch."""
