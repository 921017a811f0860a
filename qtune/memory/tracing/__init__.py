"""One training step on tensors without storage, every byte counted."""
