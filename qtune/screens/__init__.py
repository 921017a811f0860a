"""Values of the stages -> what the terminal shows; called by cli.py alone."""
