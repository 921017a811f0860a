"""What a run really needed, and what was alive when memory ran out."""
