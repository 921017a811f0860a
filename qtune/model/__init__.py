"""The base model: found, loaded in 4 bits, frozen and small."""
