"""A recipe's adapter table -> peft's adapter on the base, how it starts, and its whole state on disk."""
