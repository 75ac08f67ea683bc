"""The tiny pipeline, written once; built once for what only reads it."""

import pytest
from diffusers.utils import logging

from flowalign.pipelines.loading import quiet
from flowalign.pipelines.roles import LoRA
from flowalign.pipelines.sd3 import Config
from tests.pipelines.tiny import tiny_pipeline

STEPS = 5


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A pipeline with a T5 encoder."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    with quiet():
        tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folder_without_t5(tmp_path_factory):
    """A pipeline that was saved without its third encoder."""
    path = tmp_path_factory.mktemp("tiny") / "without_t5"
    with quiet(level=logging.ERROR):
        tiny_pipeline(with_t5=False).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def build(folder):
    """Build the tiny pipeline with some settings."""

    def built(guidance=1.0, *, seed=0, **options):
        settings = {
            "model": str(folder),
            "num_steps": STEPS,
            "guidance_scale": guidance,
            "max_sequence_length": 12,
            "lora": LoRA(rank=4, alpha=8),
        }
        return Config(**(settings | options)).build(seed=seed)

    return built


@pytest.fixture(scope="session")
def plain_and_guided(build):
    """Both kinds of call, shared: never train these."""
    return {guidance: build(guidance) for guidance in (1.0, 4.5)}


@pytest.fixture(params=[1.0, 4.5], ids=["plain", "guided"])
def shared(request, plain_and_guided):
    """One of the shared pipelines."""
    return plain_and_guided[request.param]


@pytest.fixture(params=[1.0, 4.5], ids=["plain", "guided"])
def fresh(request, build):
    """A pipeline of the test's own."""
    return build(request.param)
