"""Configurations that ship with flowalign: one YAML is one reproducible run."""
