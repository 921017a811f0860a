"""A finished run in memory: generating, evaluating, talking."""
