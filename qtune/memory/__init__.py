"""Memory of a training step: predicted by tracing, measured, fitted to a card."""
