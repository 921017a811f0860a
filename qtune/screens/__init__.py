"""Values of the stages -> what the terminal shows; called by the verbs alone."""
