"""Data, choice of the number of heads, trainer and analysis."""
