"""The verbs: what each takes from the command line, and the stages that it calls."""
