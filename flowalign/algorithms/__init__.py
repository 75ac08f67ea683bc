"""Algorithms, one file each: a composition of parts of the core."""
