"""Record and replay of a StableDiffusion3Pipeline, bit for bit in float32."""

from dataclasses import replace

import pytest
import torch

from flowalign.core.kernels import Euler, FlowSDE, gaussian_log_prob
from flowalign.core.plans import chain, ode
from flowalign.pipelines import lora_files, record, sd3
from flowalign.pipelines.roles import LoRA
from tests.pipelines import tiny

PROMPTS = ["a photo of a ring", "a photo of a red moon", "a photo of a ring"]
STEPS = 5


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("tiny") / "sd3")


def config(folder, guidance=1.0, **options):
    return sd3.Config(model=str(folder), num_steps=STEPS, guidance_scale=guidance, max_sequence_length=16, **options)


@pytest.fixture(params=[1.0, 4.5], ids=["no guidance", "guidance"])
def pipeline(request, folder):
    return config(folder, request.param).build()


def initial(num=3, seed=0):
    return torch.randn(num, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def noise(step):
    return torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(100 + step))


def of_step(transitions, step):
    return transitions.take((transitions.step == step).nonzero().squeeze(1))


def test_with_euler_kernels_images_are_those_of_the_untouched_pipeline(pipeline, folder):
    pipe, guidance = tiny.untouched(folder), pipeline.family.guidance_scale
    expected = pipe(
        "a photo of a ring",
        num_images_per_prompt=3,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    x_init = pipe.prepare_latents(3, 16, 32, 32, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(7))
    done = pipeline.rollout(pipeline.encode(["a photo of a ring"] * 3), ode(STEPS), x_init=x_init, noise=noise)
    assert torch.equal(pipeline.decode(done.x0), expected)


def test_replayed_velocities_are_the_recorded_ones_and_the_ratio_is_exactly_one(pipeline):
    cond, kernel = pipeline.encode(PROMPTS), FlowSDE(0.7)
    table = pipeline.rollout(cond, chain(kernel, STEPS), x_init=initial(), noise=noise).transitions
    assert len(table) == 3 * (STEPS - 1)
    for step in range(STEPS - 1):
        rows = of_step(table, step)
        with torch.no_grad():
            velocity = pipeline.velocity(rows.x, rows.sigma, cond.take(rows.sample))
        assert torch.equal(velocity, rows.velocity)
        mean = kernel(rows.x, velocity, rows.sigma, rows.sigma_next).mean
        again = gaussian_log_prob(rows.x_next, mean, rows.std, reduction="mean")
        assert torch.equal((again - rows.mean_log_prob()).exp(), torch.ones(3))


def test_replaying_in_another_batch_agrees_within_rounding(pipeline):
    cond = pipeline.encode(PROMPTS)
    table = pipeline.rollout(cond, chain(FlowSDE(0.7), STEPS), x_init=initial(), noise=noise).transitions
    with torch.no_grad():
        whole = pipeline.velocity(table.x, table.sigma, cond.take(table.sample))
    # 1e-5 of a velocity of order 1 moves a mean log-ratio by far less than a clip of 1e-4.
    assert (whole - table.velocity).abs().max() < 1e-5


def test_resuming_in_the_middle_equals_going_on(pipeline):
    cond, plan = pipeline.encode(PROMPTS), chain(FlowSDE(0.7), STEPS)
    whole = pipeline.rollout(cond, plan, x_init=initial(), noise=noise)
    middle = of_step(whole.transitions, 2)
    resumed = pipeline.rollout(cond, plan, x_init=middle.x, noise=noise, start=2)
    assert torch.equal(resumed.x0, whole.x0)
    assert resumed.transitions.step.unique().tolist() == [2, 3]


def test_without_noise_the_sde_is_the_ode(pipeline):
    cond = pipeline.encode(PROMPTS)
    stochastic = pipeline.rollout(cond, chain(FlowSDE(0.0), STEPS).without_training(), x_init=initial(), noise=noise)
    assert (stochastic.x0 - pipeline.rollout(cond, ode(STEPS), x_init=initial(), noise=noise).x0).abs().max() < 1e-5


def test_batches_of_a_rollout_change_nothing_beyond_rounding(pipeline):
    cond, plan = pipeline.encode(PROMPTS), chain(FlowSDE(0.7), STEPS)
    whole = pipeline.rollout(cond, plan, x_init=initial(), noise=noise)
    parts = pipeline.rollout(cond, plan, x_init=initial(), noise=noise, batch_size=2)
    assert (parts.x0 - whole.x0).abs().max() < 1e-4
    assert parts.transitions.sample.tolist() == whole.transitions.sample.tolist()


def test_conditioning_does_not_depend_on_batch_mates(pipeline):
    together, alone = pipeline.encode(PROMPTS), pipeline.encode(PROMPTS[1:2])
    first, second = together.take(torch.tensor([1])).arguments()[0], alone.arguments()[0]
    assert torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])


def test_text_is_encoded_once_for_each_distinct_prompt(pipeline, monkeypatch):
    calls = []
    original = pipeline.pipe.encode_prompt
    monkeypatch.setattr(pipeline.pipe, "encode_prompt", lambda *a, **k: calls.append(k.get("prompt")) or original(*a, **k))
    pipeline._learn()
    calls.clear()
    pipeline.encode(["one ring", "two rings", "one ring"])
    pipeline.encode(["two rings"])
    assert calls == [["one ring"], ["two rings"]]


def test_the_grid_is_the_schedulers_own(pipeline, folder):
    scheduler = tiny.untouched(folder).scheduler
    scheduler.set_timesteps(STEPS)
    assert torch.equal(pipeline.sigmas(), scheduler.sigmas)


def test_a_rollout_leaves_the_pipeline_as_it_was(pipeline):
    before = dict(vars(pipeline.pipe))
    cond = pipeline.encode(PROMPTS)
    pipeline.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    with pytest.raises(RuntimeError, match="boom"):
        pipeline.rollout(cond, chain(FlowSDE(0.7), STEPS), x_init=initial(), noise=lambda step: (_ for _ in ()).throw(RuntimeError("boom")))
    after = vars(pipeline.pipe)
    assert after["scheduler"] is before["scheduler"]
    assert after["transformer"] is before["transformer"]


def trained(pipeline, rate=1e-2):
    cond = pipeline.encode(PROMPTS)
    for _ in range(2):
        loss = pipeline.velocity(initial(), torch.tensor(0.5), cond).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in pipeline.roles.trainable_parameters():
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    return cond


def test_adapters_start_at_the_base_reach_every_attention_layer_and_leave_the_reference_alone(pipeline, folder):
    base = replace(config(folder, pipeline.family.guidance_scale), lora=None).build()
    with torch.no_grad():
        expected = base.velocity(initial(), torch.tensor(0.5), base.encode(PROMPTS))
        assert torch.equal(pipeline.velocity(initial(), torch.tensor(0.5), pipeline.encode(PROMPTS)), expected)
    # Two blocks of eight projections; the last block's context stream ends without one.
    assert pipeline.roles.num_layers == 15
    pipeline.roles.add("reference")
    pipeline.roles.add("ema")
    cond = trained(pipeline)
    with torch.no_grad():
        assert torch.equal(pipeline.velocity(initial(), torch.tensor(0.5), cond, "reference"), expected)
        assert torch.equal(pipeline.velocity(initial(), torch.tensor(0.5), cond, "ema"), expected)
        assert not torch.equal(pipeline.velocity(initial(), torch.tensor(0.5), cond), expected)


def test_switching_roles_does_not_disturb_the_gradient_of_current(pipeline):
    pipeline.roles.add("ema")
    pipeline.roles.add("reference")
    cond = pipeline.encode(PROMPTS)

    def gradients(switch):
        velocity = pipeline.velocity(initial(), torch.tensor(0.5), cond)
        if switch:
            for role in ("ema", "reference"):
                pipeline.velocity(initial(), torch.tensor(0.5), cond, role)
        velocity.square().mean().backward()
        found = [parameter.grad.clone() for parameter in pipeline.roles.trainable_parameters()]
        for parameter in pipeline.roles.trainable_parameters():
            parameter.grad = None
        return found

    for plain, switched in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, switched)


@pytest.mark.parametrize("lora", [LoRA(rank=4, alpha=8), None], ids=["lora", "full"])
def test_slow_roles_blend_by_their_decay(folder, lora):
    pipeline = replace(config(folder), lora=lora).build()
    pipeline.roles.add("ema")
    old = {name: value.detach().clone() for name, value in pipeline.roles.parameters("ema").items()}
    trained(pipeline)
    pipeline.roles.blend("ema", 0.75)
    for name, value in pipeline.roles.parameters("ema").items():
        expected = 0.75 * old[name] + 0.25 * pipeline.roles.parameters("current")[name]
        assert (value - expected).abs().max() < 1e-6


def test_a_saved_adapter_gives_the_same_images_in_an_untouched_pipeline(pipeline, folder, tmp_path):
    trained(pipeline)
    pipeline.save(tmp_path / "weights")
    pipe = tiny.untouched(folder)
    pipe.load_lora_weights(tmp_path / "weights")
    arguments = {"num_inference_steps": STEPS, "guidance_scale": pipeline.family.guidance_scale, "max_sequence_length": 16}
    x_init = initial(1)
    expected = pipe("a photo of a ring", latents=x_init, output_type="pt", **arguments).images
    done = pipeline.rollout(pipeline.encode(["a photo of a ring"]), ode(STEPS), x_init=x_init, noise=noise)
    assert torch.equal(pipeline.decode(done.x0), expected)
    assert lora_files.settings(tmp_path / "weights")[:2] == (32, 64.0)


def test_a_saved_adapter_loads_into_a_new_run_and_a_foreign_one_is_refused(folder, tmp_path):
    first, second = config(folder, lora=LoRA(rank=4)).build(), config(folder, lora=LoRA(rank=4)).build(seed=5)
    cond = trained(first)
    first.save(tmp_path / "weights")
    second.load_lora(tmp_path / "weights")
    with torch.no_grad():
        x = initial()
        assert torch.equal(first.velocity(x, torch.tensor(0.5), cond), second.velocity(x, torch.tensor(0.5), second.encode(PROMPTS)))
    with pytest.raises(ValueError, match="shape"):
        config(folder, lora=LoRA(rank=8)).build().load_lora(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="no LoRA there"):
        second.load_lora(tmp_path)


def test_full_weights_are_saved_as_a_pipeline(folder, tmp_path):
    pipeline = replace(config(folder), lora=None).build()
    cond = trained(pipeline, 1e-3)
    pipeline.save(tmp_path / "model")
    again = replace(config(tmp_path / "model"), lora=None).build()
    with torch.no_grad():
        x = initial()
        assert torch.equal(pipeline.velocity(x, torch.tensor(0.5), cond), again.velocity(x, torch.tensor(0.5), again.encode(PROMPTS)))


def test_what_was_written_wrongly_never_takes_its_name(folder, tmp_path, monkeypatch):
    pipeline = config(folder).build()
    trained(pipeline)
    monkeypatch.setattr(pipeline.roles, "lora_state_dict", lambda role: {k: v * 1.5 for k, v in type(pipeline.roles).lora_state_dict(pipeline.roles, role).items()})
    with pytest.raises(RuntimeError, match="does not behave like the trained weights"):
        pipeline.save(tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_keeps_float32_latents_and_a_small_ratio_gap(folder):
    pipeline, kernel = config(folder, dtype="bfloat16").build(), FlowSDE(0.7)
    cond = pipeline.encode(PROMPTS)
    table = pipeline.rollout(cond, chain(kernel, STEPS), x_init=initial(), noise=noise).transitions
    assert table.x.dtype == table.mean.dtype == torch.float32
    rows = of_step(table, 1)
    with torch.no_grad():
        velocity = pipeline.velocity(rows.x, rows.sigma, cond.take(rows.sample))
    mean = kernel(rows.x, velocity, rows.sigma, rows.sigma_next).mean
    gap = gaussian_log_prob(rows.x_next, mean, rows.std, reduction="mean") - rows.mean_log_prob()
    assert gap.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "nowhere"}, FileNotFoundError, "neither a folder nor a hub id"),
        ({"height": 40}, ValueError, "multiples of 8 pixels up to 32, got 40"),
        ({"height": 30}, ValueError, "multiples of 8 pixels"),
        ({"dtype": "float16"}, ValueError, "float16 is not usable on a CPU"),
        ({"lora": LoRA(targets=("attn.to_qq",))}, ValueError, "'attn.to_qq' matches no linear layer; there are"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_what_to_do(folder, options, error, message):
    with pytest.raises(error, match=message):
        replace(config(folder), **options).build()


def test_a_folder_without_safetensors_is_refused(folder, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no safetensors"):
        config(tmp_path).build()
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        config(folder / "vae").build()


def test_a_pipeline_that_edits_its_latents_is_refused(folder):
    pipeline = config(folder).build()
    cond = pipeline.encode(PROMPTS)
    edit = lambda pipe, step, timestep, values: {"latents": values["latents"] + 1.0}  # noqa: E731
    pipeline.family = replace(pipeline.family, arguments={**pipeline.family.arguments, "callback_on_step_end": edit})
    with pytest.raises(ValueError, match="edited its latents before step 1"):
        pipeline.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)


def test_guidance_that_is_not_linear_is_refused_with_its_residual(folder, monkeypatch):
    pipeline, seen = config(folder, 4.5).build(), record.Probe.step

    def renormalised(self, index, model_output, sample):
        # What the scheduler of a pipeline with renormalised guidance would be given.
        return seen(self, index, model_output * model_output.abs(), sample)

    monkeypatch.setattr(record.Probe, "step", renormalised)
    with pytest.raises(ValueError, match="not a linear combination"):
        pipeline.encode(PROMPTS)


def test_a_plan_of_another_length_is_refused(pipeline):
    with pytest.raises(ValueError, match="x_init: got shape"):
        pipeline.rollout(pipeline.encode(PROMPTS), ode(STEPS), x_init=initial(2), noise=noise)
    with pytest.raises(ValueError, match="start: got 9"):
        pipeline.rollout(pipeline.encode(PROMPTS), chain(Euler(), STEPS), x_init=initial(), noise=noise, start=9)
