"""Shared primitives: they know no paper, no data set and no file path."""
