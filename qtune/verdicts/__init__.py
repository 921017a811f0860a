"""What a run has come to, in a sentence each: learned, overfitted, rate, memory, export. Files of the run -> values."""
