"""What roles cost: counted on the real configurations without their weights, and measured on a small model."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from benchmarks.random_models import FLUX_DEV, SD35_MEDIUM
from flowalign.pipelines.family import JOINT_ATTENTION
from flowalign.pipelines.roles import Roles
from flowalign.run_config import load_config
from tests.pipelines import families

CASES = {
    "sd35m_f_distill": (SD3Transformer2DModel, SD35_MEDIUM, 2.2e9, 2.6e9, 0.25),
    "flux_f_distill": (FluxTransformer2DModel, FLUX_DEV, 11.8e9, 12.0e9, 0.10),
}


@pytest.mark.parametrize("name", CASES)
def test_student_and_fake_score_add_little_to_one_frozen_base(name):
    kind, config, least, most, share = CASES[name]
    lora = load_config(name).pipeline.lora
    assert lora.rank == 32
    with torch.device("meta"):
        network = kind(**config).to(torch.bfloat16)
        assert least < sum(value.numel() for value in network.parameters()) < most
        roles = Roles(network, lora, JOINT_ATTENTION)
        roles.add("fake", trained=True)
    sizes = roles.memory()
    adapter = sum(value.numel() for value in roles.parameters("current").values())
    assert sizes["current"] == sizes["fake"] == adapter * 4 * 4  # float32: weight, gradient, two moments
    assert (sizes["current"] + sizes["fake"]) / sizes["base"] <= share


def test_the_count_is_what_training_allocates():
    roles = families.build("sd3").roles
    roles.add("fake", trained=True)
    sizes = roles.memory()
    for name in ("current", "fake"):
        parameters = roles.trainable_parameters(name)
        optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = [*parameters, *(parameter.grad for parameter in parameters)]
        held += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        assert sizes[name] == sum(value.untyped_storage().nbytes() for value in held)
    others = {id(value) for name in ("current", "fake") for value in roles.trainable_parameters(name)}
    assert sizes["base"] == sum(value.untyped_storage().nbytes() for value in roles.module.parameters() if id(value) not in others)
