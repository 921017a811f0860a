"""TOML text -> Recipe, or every error at once."""
