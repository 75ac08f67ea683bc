"""What saves memory and time: each switch is really on, and numbers stay what they were within the stated error."""

import functools
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flowalign.core.kernels import DDIM, FlowSDE
from flowalign.core.plans import chain, ode
from flowalign.pipelines import economy, record
from flowalign.pipelines.base import FlowPipeline
from flowalign.pipelines.conditioning import moved
from flowalign.pipelines.recorder import Recorder
from tests.pipelines import families

PROMPTS = ["a", "b"]


def thrifty(case, **options):
    """A tiny pipeline with switches on."""
    config, pipe = families.settings(case, **options), families.pipeline(case)
    pipe = config.thrifty(pipe)
    return FlowPipeline(pipe, config.family(pipe), config.lora, num_steps=config.num_steps, offload=config.offload)


def noise_of(flow, num=2, seed=0):
    return torch.randn(num, *flow.event_shape, generator=torch.Generator().manual_seed(seed))


def images(flow):
    cond = flow.encode(PROMPTS)
    return flow.decode(flow.rollout(cond, ode(flow.num_steps), x_init=noise_of(flow), noise=lambda step: None).x0)


def trained(flow):
    """A velocity and its gradient, away from the adapters' first weights."""
    with torch.no_grad():
        for number, value in enumerate(flow.roles.trainable_parameters()):
            value.copy_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    velocity = flow.velocity(noise_of(flow), torch.tensor([0.7, 0.3]), flow.encode(PROMPTS))
    velocity.square().mean().backward()
    return velocity.detach(), torch.cat([value.grad.flatten() for value in flow.roles.trainable_parameters()])


@pytest.mark.parametrize("case", ["sd3 guided", "flux dev"])
def test_parts_that_rest_come_to_the_device_for_their_work_and_leave_it_again(case, monkeypatch):
    flow = thrifty(case, offload=True)
    expected = images(families.build(case))
    events = []
    for name, part in flow.resting.parts.items():
        move = part.to
        monkeypatch.setattr(part, "to", lambda *to, name=name, move=move: (events.append(("to", name)), move(*to))[1])
        for worker in (part, getattr(part, "decoder", None)):
            if isinstance(worker, torch.nn.Module):
                worker.register_forward_pre_hook(lambda *args, name=name: events.append(("works", name)))
    texts = [name for name in flow.resting.parts if name != "vae"]
    assert texts
    assert "vae" in flow.resting.parts
    assert flow.family.denoiser not in flow.resting.parts

    def seen(work):
        events.clear()
        result = work()
        return result, list(events)

    flow.sigmas()
    flow.learnt()
    _, told = seen(lambda: flow.encode(PROMPTS))
    assert told[: len(texts)] == told[-len(texts) :] == [("to", name) for name in texts]  # once for both prompts
    assert {name for what, name in told[len(texts) : -len(texts)] if what == "works"} == set(texts)
    assert not any(what == "to" for what, _ in told[len(texts) : -len(texts)])
    cond, told = seen(lambda: flow.encode(PROMPTS[::-1]))
    assert told == []  # encoded already
    done, told = seen(lambda: flow.rollout(flow.encode(PROMPTS), ode(flow.num_steps), x_init=noise_of(flow), noise=lambda step: None))
    assert told == []
    made, told = seen(lambda: flow.decode(done.x0))
    assert told[0] == told[-1] == ("to", "vae")
    assert set(told[1:-1]) == {("works", "vae")}
    assert torch.equal(made, expected)


def test_a_part_that_works_inside_an_outer_block_is_moved_once():
    part = torch.nn.Linear(1, 1)
    moves = []
    part.to = moves.append
    resting = economy.Resting({"text_encoder": part}, torch.device("meta"))
    with resting.awake(text=True, images=True), resting.awake(text=True):
        assert moves == ["cpu", torch.device("meta")]
    assert moves == ["cpu", torch.device("meta"), "cpu"]
    with pytest.raises(RuntimeError, match="broken"), resting.awake(text=True):
        raise RuntimeError("broken")
    assert moves[3:] == [torch.device("meta"), "cpu"]


def test_the_autoencoder_decodes_image_by_image_and_tile_by_tile():
    flow = thrifty("sd3", vae_slicing=True)
    sizes = []
    flow.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    expected = images(families.build("sd3"))
    made = images(flow)
    assert [size[0] for size in sizes] == [1, 1]
    assert (made - expected).abs().max() < 1e-6  # other batches sum in another order
    tiled = thrifty("sd3", vae_tiling=True)
    tiled.pipe.vae.tile_latent_min_size, tiled.pipe.vae.tile_sample_min_size = 4, 8
    tiled.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    sizes.clear()
    x = noise_of(tiled)
    made = tiled.decode(x)
    assert len(sizes) == 9
    assert all(max(size[2:]) <= 4 for size in sizes)
    assert made.shape == expected.shape
    # Where nothing is blended, a tile is what its latents alone decode to.
    assert (made[..., :6, :6] - families.build("sd3").decode(x[..., :4, :4])[..., :6, :6]).abs().max() < 1e-6


@pytest.mark.parametrize("case", ["sd3", "flux dev", "sd 1.5"])
def test_checkpointed_activations_change_no_gradient_and_are_computed_twice(case):
    def counted(flow):
        with FlopCounterMode(display=False) as counter:
            found = trained(flow)
        return *found, counter.get_total_flops()

    plain, spare = families.build(case), thrifty(case, gradient_checkpointing=True)
    plain.encode(PROMPTS)
    spare.encode(PROMPTS)
    velocity, gradient, flops = counted(plain)
    again, other, more = counted(spare)
    assert torch.equal(again, velocity)
    assert (other - gradient).abs().max() <= 1e-6 * gradient.abs().max()
    assert more > 1.2 * flops


@pytest.mark.parametrize(("case", "num_blocks"), [("sd3", 2), ("flux dev", 2)])
def test_repeated_blocks_are_compiled_and_behave_the_same_under_every_role(case, num_blocks, monkeypatch):
    compiled = []
    compile_module = torch.nn.Module.compile

    def traced(module, **options):
        compiled.append(module)
        compile_module(module, backend="eager", **options)  # traced like ever, without inductor's C++

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, flow = families.build(case), thrifty(case, compile=True)
    assert len(compiled) == num_blocks
    assert len({type(block) for block in compiled}) == (2 if case == "flux dev" else 1)
    velocity, gradient = trained(plain)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        again, other = trained(flow)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    size = velocity.abs().max()
    assert (again - velocity).abs().max() < 1e-5 * size
    assert (other - gradient).abs().max() < 1e-4 * gradient.abs().max()
    x, cond = noise_of(flow), flow.encode(PROMPTS)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        base = flow.velocity(x, torch.tensor(0.5), cond, "reference")
    assert (base - plain.velocity(x, torch.tensor(0.5), plain.encode(PROMPTS), "reference")).abs().max() < 1e-5 * size
    assert (base - flow.velocity(x, torch.tensor(0.5), cond)).abs().max() > 1e-2 * size
    torch._dynamo.reset()


def test_a_denoiser_without_repeated_blocks_is_not_compiled():
    with pytest.raises(ValueError, match="Linear repeats no block that could be compiled; set compile: false"):
        economy.compile_blocks(torch.nn.Linear(1, 1))


@pytest.fixture
def torchs_own():
    """diffusers keeps the last backend that was chosen for whoever has none of his own."""
    yield
    families.pipeline("flux dev").transformer.set_attention_backend("native")


def test_a_backend_of_attention_is_taken_by_every_layer(torchs_own):
    flow = thrifty("flux dev", attention="_native_math")
    chosen = {layer.processor._attention_backend for layer in flow.denoiser.modules() if hasattr(layer, "processor")}
    assert chosen == {AttentionBackendName("_native_math")}
    plain = families.build("flux dev")
    expected, _ = trained(plain)
    made, _ = trained(flow)
    assert (made - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("case", "backend", "message"),
    [
        ("flux dev", "flsh", "pipeline.attention: got 'flsh', needed one of flash, "),
        ("flux dev", "xformers", "pipeline.attention: 'xformers' is not to be had here"),
        ("sd3", "native", "no layer of SD3Transformer2DModel takes a backend .* set attention: null"),
    ],
)
def test_a_backend_that_is_not_there_or_not_taken_is_refused(case, backend, message, torchs_own):
    with pytest.raises(ValueError, match=message):
        thrifty(case, attention=backend)


def test_an_autoencoder_that_cannot_be_sliced_is_refused():
    pipe = families.pipeline("sd3")
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="pipeline.vae_slicing: Linear cannot do this"):
        economy.spare_autoencoder(pipe, slicing=True, tiling=False)


class NoCopies(TorchDispatchMode):
    """Refuses to bring anything to the device while ``is_on``: from pageable memory that waits for whatever the device is at."""

    def __init__(self, is_on):
        super().__init__()
        self.is_on = is_on

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_on():
            to = str(kwargs.get("device"))
            if function is torch.ops.aten._to_copy.default:
                assert not (to == "meta" and args[0].device.type == "cpu"), "a copy to the device"
            if function is torch.ops.aten.copy_.default:
                assert not (args[0].device.type == "meta" and args[1].device.type == "cpu"), "a copy to the device"
            if function is torch.ops.aten.index.Tensor and args[0].device.type == "meta":
                assert not any(index is not None and index.device.type == "cpu" for index in args[1]), "indices on the CPU"
        return function(*args, **kwargs)


class Reached(Exception):
    """How many steps were taken before anything was read."""


@pytest.mark.parametrize("case", ["sd3 guided", "flux dev", "sd 1.5 guided", "sdxl guided", "qwen_image guided", "z_image guided"])
def test_no_denoising_step_waits_for_the_device(case, monkeypatch):
    """On a device that has no numbers, whoever reads one fails: only the schedule before the first step and the checks after the last.

    Nor is anything brought there meanwhile, but for what denoisers do inside (tables of positions): what steps draw is on its way before the first.
    """
    flow = families.build(case)
    plan = chain(DDIM(1.0) if flow.family.denoiser == "unet" else FlowSDE(0.7), flow.num_steps)
    cond, draws = flow.encode(PROMPTS), lambda step: noise_of(flow, seed=step + 1)
    flow.rollout(cond, plan, x_init=noise_of(flow), noise=draws)  # what is learnt at the first call
    flow.pipe.to("meta")
    stand_in = flow.learnt().stand_in
    if stand_in is not None:
        flow._learnt = flow.learnt()._replace(stand_in=replace(stand_in, leaves=tuple(moved(part, "meta") for part in stand_in.leaves)))
    options = {"x_init": noise_of(flow), "noise": draws}
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        flow.rollout(cond.to("meta"), plan, **options)
    driven, called, read, may_read = record.driven_scheduler, Recorder.call, torch.Tensor.tolist, [True]

    def scheduled(scheduler, driver):
        """The schedule is read before it goes to the device."""
        made = driven(scheduler, driver)
        schedule = made.set_timesteps

        @functools.wraps(schedule)
        def set_timesteps(*args, **kwargs):
            schedule(*args, **{**kwargs, "device": "cpu"})
            made.timesteps = made.timesteps.to("meta")

        made.set_timesteps = set_timesteps
        return made

    def call(self, arguments):
        may_read[0] = False
        return called(self, arguments)

    def tolist(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype).tolist() if may_read[0] and tensor.device.type == "meta" else read(tensor)

    def reached(self, latents):
        raise Reached(len(self.levels))

    monkeypatch.setattr(record, "driven_scheduler", scheduled)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(Recorder, "call", call)
    monkeypatch.setattr(Recorder, "check", reached)
    inside = [False]
    flow.denoiser.register_forward_pre_hook(lambda *args: inside.__setitem__(0, True))
    flow.denoiser.register_forward_hook(lambda *args: inside.__setitem__(0, False))
    with pytest.raises(Reached) as end, NoCopies(lambda: not may_read[0] and not inside[0]):
        flow.rollout(cond.to("meta"), plan, **options)
    assert end.value.args == (flow.num_steps,)
    assert not may_read[0]


def test_levels_of_several_steps_are_one_pass_of_the_denoiser():
    flow = families.build("sd3")
    cond, calls = flow.encode(["a"] * 6), []
    flow.denoiser.register_forward_hook(lambda *args: calls.append(1))
    x, sigma = noise_of(flow, 6), torch.linspace(0.9, 0.1, 6)
    whole = flow.velocity(x, sigma, cond)
    assert len(calls) == 1
    each = [flow.velocity(x[i : i + 1], sigma[i : i + 1], cond.take(torch.tensor([i]))) for i in range(6)]
    assert (whole - torch.cat(each)).abs().max() < 1e-5
