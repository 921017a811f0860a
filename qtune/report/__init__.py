"""The report of a run: its folder -> one HTML page that needs nothing else, neither network nor scripts."""
