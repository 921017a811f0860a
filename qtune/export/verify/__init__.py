"""An exported folder against the model that was trained."""
