"""A run's folder: its files, each with its writer and its reader."""
