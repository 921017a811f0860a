"""A run becomes a model that others can load: merged, baked, converted, and compared with the one that was trained."""
