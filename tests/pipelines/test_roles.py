"""Roles: versions of one network that share a base and leave each other alone."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline  # noqa: F401  (its import is slow; here it counts for no test)
from peft.tuners.lora import LoraLayer

from flowalign.pipelines.roles import LoRA
from tests.pipelines.tiny import PROMPTS, initial, nudge, probe

HALF = torch.tensor(0.5)


def test_adapters_reach_every_attention_layer_and_start_at_the_base(fresh, build):
    base = build(fresh.family.guidance_scale, lora=None)
    assert torch.equal(probe(fresh, fresh.encode(PROMPTS)), probe(base, base.encode(PROMPTS)))
    # Eight projections in the first block; the last block's text ends without an output projection.
    assert fresh.roles.num_layers == 15
    for block, names in (
        (0, ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        (1, ("to_q", "add_k_proj")),
    ):
        for name in names:
            assert f"transformer_blocks.{block}.attn.{name}" in fresh.roles.layers
    assert all(isinstance(fresh.denoiser.get_submodule(name), LoraLayer) for name in fresh.roles.layers)


def test_a_trained_copy_of_all_weights_carries_its_own_gradient(build):
    flow = build(lora=None)
    flow.roles.add("fake", trained=True)
    flow.velocity(initial(), HALF, flow.encode(PROMPTS), "fake").square().sum().backward()
    assert all(parameter.grad is None for parameter in flow.roles.trainable_parameters("current"))
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in flow.roles.trainable_parameters("fake"))


def test_every_adapter_gets_a_gradient_and_nothing_else_does(fresh):
    cond = fresh.encode(PROMPTS)
    with torch.no_grad():
        for name, parameter in fresh.roles.parameters("current").items():
            if "lora_B" in name:
                parameter += 0.01
    fresh.velocity(initial(), HALF, cond).square().sum().backward()
    unmoved = [name for name, parameter in fresh.roles.parameters("current").items() if not parameter.grad.any()]
    # The last block throws its text stream away, so nobody reads what the text asks there.
    assert unmoved == [f"transformer_blocks.1.attn.add_q_proj.lora_{factor}.weight" for factor in "AB"]
    with_gradient = {id(parameter) for parameter in fresh.denoiser.parameters() if parameter.grad is not None}
    assert with_gradient == {id(parameter) for parameter in fresh.roles.trainable_parameters()}


def test_the_reference_is_the_base_bit_for_bit_whatever_adapters_exist(fresh, build):
    base = build(fresh.family.guidance_scale, lora=None)
    expected = probe(base, base.encode(PROMPTS))
    fresh.roles.add("old")
    cond = nudge(fresh)
    assert torch.equal(probe(fresh, cond, "reference"), expected)
    assert torch.equal(probe(fresh, cond, "old"), expected)
    assert not torch.equal(probe(fresh, cond), expected)


def test_switching_roles_does_not_disturb_the_gradient_of_current(fresh):
    fresh.roles.add("old")
    cond = nudge(fresh)

    def gradients(switch):
        velocity = fresh.velocity(initial(), HALF, cond)
        for role in ("old", "reference") if switch else ():
            assert not fresh.velocity(initial(), HALF, cond, role).requires_grad
        loss = velocity.square().mean()
        if switch:
            # The backward pass itself may happen while another role acts.
            with fresh.roles.use("reference"):
                loss.backward()
        else:
            loss.backward()
        found = [parameter.grad.clone() for parameter in fresh.roles.trainable_parameters()]
        fresh.denoiser.zero_grad(set_to_none=True)
        return found

    for plain, switched in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, switched)


def test_roles_nest_and_come_back_also_after_an_error(build):
    flow = build()
    flow.roles.add("old")
    cond = nudge(flow)
    current, reference, old = (probe(flow, cond, role) for role in ("current", "reference", "old"))
    assert torch.equal(old, reference)
    assert not torch.equal(current, reference)
    with pytest.raises(RuntimeError, match="boom"), flow.roles.use("reference"):
        assert torch.equal(probe(flow, cond), current)  # by name, whatever acts outside
        with flow.roles.use("current") as network, torch.no_grad():
            assert torch.equal(flow.replayed(network, initial(), HALF, cond), current)
        with torch.no_grad():
            assert torch.equal(flow.replayed(flow.denoiser, initial(), HALF, cond), reference)
        raise RuntimeError("boom")
    assert torch.equal(probe(flow, cond), current)
    assert all(parameter.requires_grad for parameter in flow.roles.trainable_parameters())


@pytest.mark.parametrize("lora", [LoRA(rank=4, alpha=8), None], ids=["lora", "full"])
def test_slow_roles_blend_by_their_decay(build, lora):
    flow = build(lora=lora)
    flow.roles.add("ema")
    flow.roles.add("reference")
    old = {name: value.detach().clone() for name, value in flow.roles.parameters("ema").items()}
    cond = flow.encode(PROMPTS)
    base = probe(flow, cond)
    nudge(flow)
    current = {name: value.detach().clone() for name, value in flow.roles.parameters("current").items()}
    flow.roles.blend("ema", 0.75)
    for name, value in flow.roles.parameters("ema").items():
        assert (value - (0.75 * old[name] + 0.25 * current[name])).abs().max() < 1e-6
    flow.roles.blend("ema", 0.0)
    flow.roles.blend("reference", 0.0)
    assert all(torch.equal(value, current[name]) for name, value in flow.roles.parameters("ema").items())
    assert torch.equal(probe(flow, cond, "ema"), probe(flow, cond))
    assert torch.equal(probe(flow, cond, "reference"), base)


@pytest.mark.parametrize("lora", [LoRA(rank=4, alpha=8), None], ids=["lora", "full"])
def test_a_stored_state_restores_every_role(build, lora):
    first, second = build(lora=lora), build(lora=lora, seed=5)
    first.roles.add("ema")
    cond = nudge(first)
    state = {role: {key: value.detach().clone() for key, value in tensors.items()} for role, tensors in first.roles.state_dict().items()}
    second.roles.load_state_dict(state)
    for role in ("current", "ema"):
        assert torch.equal(probe(second, second.encode(PROMPTS), role), probe(first, cond, role))
    del state["ema"]
    with pytest.raises(ValueError, match="missing ema"):
        second.roles.load_state_dict(state)
    name, tensor = next(iter(state["current"].items()))
    with pytest.raises(ValueError, match="stored shape"):
        second.roles.load("current", {**state["current"], name: tensor[:1, :1]})


def test_gradient_checkpointing_changes_no_gradient(build):
    found = []
    for checkpointing in (False, True):
        flow = build(gradient_checkpointing=checkpointing)
        cond = nudge(flow)
        flow.velocity(initial(), HALF, cond).square().mean().backward()
        found.append([parameter.grad for parameter in flow.roles.trainable_parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


def test_adapters_are_trained_in_float32_on_a_bfloat16_base(build):
    flow = build(dtype="bfloat16")
    flow.roles.add("old")
    assert {parameter.dtype for role in ("current", "old") for parameter in flow.roles.parameters(role).values()} == {torch.float32}
    assert flow.denoiser.proj_out.weight.dtype == torch.bfloat16
    before = probe(flow, flow.encode(PROMPTS))
    cond = nudge(flow)
    assert not torch.equal(probe(flow, cond), before)
    assert torch.equal(probe(flow, cond, "reference"), before)


def test_full_training_in_bfloat16_keeps_float32_weights(build):
    flow = build(dtype="bfloat16", lora=None)
    assert {parameter.dtype for parameter in flow.roles.trainable_parameters()} == {torch.float32}
    cond, seen = flow.encode(PROMPTS), []
    handle = flow.denoiser.proj_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert flow.velocity(initial(), HALF, cond).dtype == torch.float32
    handle.remove()
    assert seen == [torch.bfloat16]


def test_networks_stay_in_evaluation_mode(fresh):
    assert not any(
        module.training for part in fresh.pipe.components.values() if isinstance(part, torch.nn.Module) for module in part.modules()
    )


def test_unknown_roles_and_targets_are_refused(build):
    flow = build()
    with pytest.raises(ValueError, match="role 'ema': not there"):
        flow.velocity(initial(), HALF, flow.encode(PROMPTS), "ema")
    with pytest.raises(ValueError, match="without dots"):
        flow.roles.add("a.b")
    with pytest.raises(ValueError, match=r"'attn.to_qq' matches no linear layer; there are attn.to_q"):
        build(lora=LoRA(targets=("attn.to_qq",)))
    with pytest.raises(ValueError, match="reference"):
        probe(build(lora=None), flow.encode(PROMPTS), "reference")
