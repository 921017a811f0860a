"""Finished runs beside each other: what each has learned, forgotten and cost, and how much of it is noise."""
