"""A training run, from its inputs to its folder."""
