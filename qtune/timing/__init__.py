"""How long a step takes: the work that its trace counted against what a device does in a second."""
