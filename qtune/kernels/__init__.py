"""The elementwise parts of a step as single operations: one pass over memory each, on a card and on a CPU."""
