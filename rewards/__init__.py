"""Rewards, one file each: a frozen ``Config`` whose ``build()`` gives a callable from images, prompts and metadata to scores."""
