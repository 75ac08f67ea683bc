"""Recipes: one file each, a frozen ``Config`` with its ``claims`` whose ``build()`` gives a chain of stages."""
