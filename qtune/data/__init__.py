"""Data: rows -> conversations -> ids and labels, with every row accounted for."""
