"""What cannot be replayed, or made at all, is refused with the reason, never silently wrong."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

from flowalign.core.kernels import Euler, FlowSDE
from flowalign.core.plans import Plan, PlanStep, chain, ode
from flowalign.pipelines.base import FlowPipeline
from flowalign.pipelines.loading import check_device, load, quiet
from flowalign.pipelines.record import Call, RecordedStep
from flowalign.pipelines.replay import Guidance, Linear, learn_replay
from flowalign.pipelines.roles import LoRA
from flowalign.pipelines.sd3 import Config
from tests.pipelines.conftest import STEPS
from tests.pipelines.tiny import PROMPTS, initial, noise, tiny_pipeline


def calling(flow, **arguments):
    """Let every call of the pipeline have some more arguments."""
    flow.family = replace(flow.family, arguments={**flow.family.arguments, **arguments})
    return flow


def wrapped(guidance=1.0, kind=StableDiffusion3Pipeline, **scheduler):
    """A tiny pipeline of a wrapper's class."""
    pipe = tiny_pipeline(kind=kind, **scheduler)
    config = Config(num_steps=STEPS, guidance_scale=guidance, max_sequence_length=12, lora=None)
    return FlowPipeline(pipe, config.family(pipe), None, num_steps=STEPS)


def scheduler_input(change):
    """A pipeline class that does something to what its denoiser said before the scheduler sees it, as custom guidance would."""

    class Wrapper(StableDiffusion3Pipeline):
        def __call__(self, *args, **options):
            step, count = self.scheduler.step, iter(range(1000))
            self.scheduler.step = lambda output, *rest, **more: step(change(output, next(count)), *rest, **more)
            return super().__call__(*args, **options)

    return Wrapper


@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "in place"])
@pytest.mark.parametrize("when", [0, STEPS - 1], ids=["first step", "last step"])
def test_a_pipeline_that_edits_its_latents_is_refused(build, in_place, when):
    flow = build()
    cond = flow.encode(PROMPTS)

    def edit(pipe, step, timestep, values):
        latents = values["latents"]
        if step != when:
            return {"latents": latents}
        return {"latents": latents.mul_(1.01) if in_place else latents + 1e-3}

    calling(flow, callback_on_step_end=edit)
    with pytest.raises(ValueError, match=f"edited its latents before step {when + 1}"):
        flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)


def test_a_pipeline_that_copies_its_latents_is_not_refused(build):
    flow = build()
    cond = flow.encode(PROMPTS)
    expected = flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise).x0
    calling(flow, callback_on_step_end=lambda pipe, step, timestep, values: {"latents": values["latents"].clone()})
    assert torch.equal(flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise).x0, expected)


def test_arguments_that_change_between_steps_are_refused(build):
    flow = build()
    cond = flow.encode(PROMPTS)

    def change(pipe, step, timestep, values):
        return {"prompt_embeds": values["prompt_embeds"] * (1.01 if step == 1 else 1.0)}

    calling(flow, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    with pytest.raises(ValueError, match="arguments in step 2 are not the conditioning .* encoder_hidden_states differs"):
        flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    again = calling(build(), callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    with pytest.raises(
        ValueError, match=r"arguments \['timestep', 'encoder_hidden_states'\] change|arguments .*encoder_hidden_states.* change"
    ):
        again.encode(PROMPTS)


def test_embeddings_of_other_prompts_are_refused(build):
    flow = build()
    cond, others = flow.encode(PROMPTS), flow.encode(["x", "y", "z"])
    flow.family = replace(flow.family, embeds=lambda given, embeds=flow.family.embeds: embeds(others))
    with pytest.raises(ValueError, match="arguments in step 0 are not the conditioning that a replay uses"):
        flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)


def test_guidance_with_a_third_call_in_some_steps_is_refused(build):
    flow = calling(build(4.5), skip_guidance_layers=[0], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.9)
    with pytest.raises(ValueError, match=r"calls its denoiser \[1, 2, 2, 2\] times"):
        flow.encode(PROMPTS)
    # Seen only after the recording of the first steps.
    late = build(4.5)
    cond = late.encode(PROMPTS)
    calling(late, skip_guidance_layers=[0], skip_layer_guidance_start=0.5, skip_layer_guidance_stop=0.9)
    with pytest.raises(ValueError, match="calls its denoiser more than 1 times in step 3"):
        late.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)


def test_guidance_that_is_not_linear_is_refused_with_its_residual():
    normalised = scheduler_input(lambda output, step: output / output.norm())
    with pytest.raises(ValueError, match=r"not a linear combination of its denoiser's outputs \(relative residual 0\.\d+\)"):
        wrapped(4.5, scheduler_input(lambda output, step: output * output.abs())).encode(PROMPTS)
    # One number per step can be divided out of each step alone, but not of all.
    with pytest.raises(ValueError, match=r"the combination changes between steps \(relative residual"):
        wrapped(4.5, normalised).encode(PROMPTS)


def test_a_combination_that_changes_after_the_recorded_steps_or_with_the_text_is_refused():
    late = wrapped(4.5, scheduler_input(lambda output, step: output if step < STEPS - 1 else 0.5 * output))
    cond = late.encode(PROMPTS)  # what is recorded is the first four steps
    with pytest.raises(ValueError, match=f"in step {STEPS - 1} the pipeline combines its denoiser's outputs otherwise than in its first"):
        late.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    is_other = []
    flow = wrapped(4.5, scheduler_input(lambda output, step: 1.1 * output if is_other else output))
    cond = flow.encode(PROMPTS)
    flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    is_other.append(True)
    with pytest.raises(ValueError, match="in step 0 the pipeline combines its denoiser's outputs otherwise"):
        flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)


def test_a_sign_or_another_factor_is_worked_out():
    flow = wrapped(kind=scheduler_input(lambda output, step: -output))
    done = flow.rollout(flow.encode(PROMPTS), chain(FlowSDE(0.3), STEPS), x_init=initial(), noise=noise)
    assert flow.learnt()[1].combine == Linear(weights=(-1.0,))
    rows = done.transitions.take(done.transitions.step == 1)
    with torch.no_grad():
        assert torch.equal(flow.velocity(rows.x, rows.sigma, flow.encode(PROMPTS)), rows.velocity)
    doubled = wrapped(4.5, scheduler_input(lambda output, step: 2 * output))
    doubled.encode(PROMPTS)
    combine = doubled.learnt()[1].combine
    assert isinstance(combine, Linear)
    assert combine.weights == pytest.approx((-7.0, 9.0), rel=1e-4)


def record(timestep, *, calls=1, combine=lambda outputs: outputs[0], sigmas=(1.0, 0.7, 0.4)):
    """Steps of a pipeline that exists only here; its denoiser says what its number and its latents are."""
    steps, generator = [], torch.Generator().manual_seed(0)
    for sigma in sigmas:
        x = torch.randn(2, 3, generator=generator)
        outputs = [torch.randn(2, 3, generator=generator) for _ in range(calls)]
        made = [
            Call(arguments={"z": x, "t": torch.full((2,), timestep(sigma)), "text": torch.full((2, 1), float(i))}, output=(out,))
            for i, out in enumerate(outputs)
        ]
        steps.append(RecordedStep(sigma=sigma, sample=x, model_output=combine(outputs), calls=made))
    return steps


def test_two_calls_of_a_step_and_reversed_time_are_worked_out():
    replay = learn_replay(
        record(lambda sigma: 1 - sigma, calls=2, combine=lambda outputs: outputs[1] + 4.0 * (outputs[0] - outputs[1])), scales=(4.0,)
    )
    assert [(call.latents, call.timestep, call.copies) for call in replay.calls] == [("z", "t", 1)] * 2
    assert (replay.slope, replay.offset) == (-1.0, 1.0)
    assert replay.combine == Guidance(unconditional=1, conditional=0, scale=4.0)
    known = (torch.empty(0), torch.empty(0))
    assert replay.timestep(torch.tensor([0.25]), known).tolist() == [0.75]


FOUR = (1.0, 0.8, 0.5, 0.2)


@pytest.mark.parametrize("shift", [3.0, 0.4])
def test_a_schedule_that_was_shifted_after_its_timesteps_were_taken_is_worked_out(shift):
    """``sigma = shift * u / (1 + (shift - 1) * u)``, and the denoiser is told ``1000 * u``."""
    replay = learn_replay(record(lambda sigma: 1000 * sigma / (sigma + shift * (1 - sigma)), sigmas=FOUR), scales=())
    assert (replay.slope, replay.offset) == (1000.0, 0.0)
    assert replay.shift == pytest.approx(shift, rel=1e-4)
    known = (torch.empty(0), torch.empty(0))
    u = torch.tensor([0.1, 0.6, 0.95])
    assert torch.allclose(replay.timestep(shift * u / (1 + (shift - 1) * u), known), 1000 * u, rtol=1e-4)


@pytest.mark.parametrize("sigmas", [FOUR[:3], FOUR])
def test_a_timestep_that_no_shift_explains_is_refused_with_what_was_seen(sigmas):
    with pytest.raises(ValueError, match=r"t is not affine in sigma .* nor in the schedule before a shift: it is told 1 at 1, "):
        learn_replay(record(lambda sigma: sigma**2, sigmas=sigmas), scales=())


def test_three_steps_do_not_tell_a_shift():
    """Three numbers fit any three steps: nothing would be checked."""
    with pytest.raises(ValueError, match="t is not affine in sigma"):
        learn_replay(record(lambda sigma: sigma / (sigma + 3 * (1 - sigma)), sigmas=FOUR[:3]), scales=())


def test_latents_that_are_changed_on_their_way_are_refused():
    steps = record(lambda sigma: sigma)
    for step in steps:
        step.calls[0].arguments["z"] = step.calls[0].arguments["z"] * 0.5
    with pytest.raises(ValueError, match=r"no argument of the denoiser equals the latents .* \[2, 3\] \(it is told z \[2, 3\]"):
        learn_replay(steps, scales=())


def test_schedulers_that_cannot_be_driven_are_refused():
    with pytest.raises(ValueError, match="stochastic_sampling: must be False"):
        wrapped(stochastic_sampling=True).sigmas()
    flow = wrapped()
    flow.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(
        ValueError, match="FlowMatchHeunDiscreteScheduler is not supported; needs a FlowMatchEulerDiscreteScheduler, or DDIM"
    ):
        flow.sigmas()
    flow.pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="clip_sample: must be False"):
        flow.sigmas()


def test_sizes_that_do_not_fit_are_refused(build):
    flow = build()
    cond = flow.encode(PROMPTS)
    with pytest.raises(ValueError, match="x_init: got shape"):
        flow.rollout(cond, ode(STEPS), x_init=initial(2), noise=noise)
    with pytest.raises(ValueError, match="x: got shape"):
        flow.velocity(initial(2), torch.tensor(0.5), cond)
    with pytest.raises(ValueError, match="start: got 9"):
        flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise, start=9)
    forking = Plan((PlanStep(kernel=FlowSDE(0.7), num_children=2), PlanStep(kernel=Euler())))
    with pytest.raises(ValueError, match="one row per state, children included"):
        flow.rollout(cond, forking, x_init=initial(), noise=noise)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "nowhere"}, FileNotFoundError, "'nowhere' is neither a folder nor a hub id"),
        ({"model": "/no/where"}, FileNotFoundError, "'/no/where' is neither a folder nor a hub id"),
        ({"height": 18}, ValueError, "pipeline.height: this model makes multiples of 4 pixels up to 32, got 18"),
        ({"width": 36}, ValueError, "pipeline.width: this model makes multiples of 4 pixels up to 32, got 36"),
        ({"dtype": "float16"}, ValueError, "float16 is not usable on a CPU"),
        ({"num_steps": 0}, ValueError, "num_steps: got 0"),
        ({"guidance_scale": 0.5}, ValueError, "guidance_scale: got 0.5"),
        ({"lora": LoRA(targets=("nothing",))}, ValueError, "'nothing' matches no linear layer"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_what_to_do(build, options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_other_sizes_are_made(build):
    flow = build(height=8, width=32)
    assert flow.event_shape == (4, 4, 16)
    x = torch.randn(1, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    done = flow.rollout(flow.encode(["bb"]), ode(STEPS), x_init=x, noise=noise)
    assert flow.decode(done.x0).shape == (1, 3, 8, 32)


def test_folders_that_are_no_pipeline_are_refused(build, folder, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no safetensors"):
        build(model=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no model_index.json"):
        build(model=str(folder / "vae"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a FluxPipeline, needed a StableDiffusion3Pipeline"):
        build(model=str(tmp_path))


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"])
def test_weights_that_cannot_be_opened_are_named(build, folder, tmp_path, part):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / part).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"{part}: not a safetensors file, or truncated .*`git lfs pull`"):
        build(model=str(model))
    whole = (folder / part).read_bytes()
    (model / part).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{part}: not a safetensors file, or truncated .*download it again"):
        build(model=str(model))


def test_a_model_that_the_hub_does_not_give_says_what_to_do(monkeypatch):
    def offline(*args, **options):
        assert options["use_safetensors"] is True
        raise OSError("gated or absent")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match=r"'owner/name' could not be loaded: gated or absent.* accept its licence .* log in"):
        load(StableDiffusion3Pipeline, "owner/name", dtype=torch.float32)


def test_half_precision_is_a_question_of_the_device():
    check_device("float16", "cuda")
    check_device("bfloat16", "cpu")
    with pytest.raises(ValueError, match="use float32"):
        check_device("float16", torch.device("cpu"))


def test_a_folder_with_files_of_a_variant_alone_says_so_and_loads_with_it(folder, tmp_path):
    with quiet():
        tiny_pipeline().save_pretrained(tmp_path / "model", variant="fp16")
    settings = Config(model=str(tmp_path / "model"), num_steps=STEPS, max_sequence_length=12, lora=None)
    with pytest.raises(
        ValueError, match=r"text_encoder has only weights of the variant fp16, got variant: null; set pipeline.variant: fp16"
    ):
        settings.build()
    built = replace(settings, variant="fp16").build()
    plain = replace(settings, model=str(folder)).build()
    for name, value in built.denoiser.state_dict().items():
        assert torch.equal(value, plain.denoiser.state_dict()[name])
    with pytest.raises(ValueError, match=r"pipeline.variant: got 'bf16', but .*model has no \*.bf16.safetensors \(variants there: fp16\)"):
        replace(settings, variant="bf16").build()
    with pytest.raises(ValueError, match=r"variants there: none"):
        replace(settings, model=str(folder), variant="fp16").build()
