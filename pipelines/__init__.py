"""Diffusers pipelines as trajectory generators: one file per family, on machinery that knows no family."""
