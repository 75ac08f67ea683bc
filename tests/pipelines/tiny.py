"""Small Stable Diffusion 3 pipelines with random weights, built on the spot."""

import torch
from diffusers import StableDiffusion3Pipeline

from flowalign.shapes import models


def build(folder, seed=0):
    """Write a pipeline whose denoiser has two layers."""
    pipe = models.new_pipeline(seed)
    config = dict(pipe.transformer.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")} | {"num_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe.register_modules(transformer=type(pipe.transformer)(**config))
    pipe.save_pretrained(folder)
    return folder


def untouched(folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
