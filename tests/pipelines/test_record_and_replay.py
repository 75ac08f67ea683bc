"""Record and replay of a StableDiffusion3Pipeline, bit for bit in float32."""

import pytest
import torch

from flowalign.core.kernels import CPS, DDIM, DanceSDE, Euler, FlowSDE, gaussian_log_prob
from flowalign.core.plans import Plan, PlanStep, chain, ode
from flowalign.core.schedules import flow_sigmas
from tests.pipelines.conftest import STEPS
from tests.pipelines.tiny import EVENT, PROMPTS, initial, noise, rows_of, untouched


def images_of(pipe, prompt, guidance, **options):
    return pipe(prompt, num_inference_steps=STEPS, guidance_scale=guidance, max_sequence_length=12, output_type="pt", **options).images


def test_with_euler_kernels_images_are_those_of_the_untouched_pipeline(shared, folder):
    pipe, guidance = untouched(folder), shared.family.guidance_scale
    expected = images_of(pipe, "bb", guidance, num_images_per_prompt=3, generator=torch.Generator().manual_seed(7))
    x_init = torch.randn(3, *EVENT, generator=torch.Generator().manual_seed(7))
    done = shared.rollout(shared.encode(["bb"] * 3), ode(STEPS), x_init=x_init, noise=noise)
    assert torch.equal(shared.decode(done.x0), expected)


def test_prompts_of_a_batch_give_the_untouched_pipelines_images_within_rounding(shared, folder):
    # The pipeline encodes a batch of texts at once, we encode each alone so that batch mates do not matter: the last bits differ.
    expected = images_of(untouched(folder), PROMPTS, shared.family.guidance_scale, latents=initial())
    done = shared.rollout(shared.encode(PROMPTS), ode(STEPS), x_init=initial(), noise=noise)
    assert (shared.decode(done.x0) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_pipeline_without_a_third_encoder_behaves_the_same(build, folder_without_t5, guidance):
    flow = build(guidance, model=str(folder_without_t5))
    pipe = untouched(folder_without_t5, text_encoder_3=None, tokenizer_3=None)
    expected = images_of(pipe, ["bb"], guidance, latents=initial(1))
    cond = flow.encode(["bb"])
    done = flow.rollout(cond, chain(Euler(), STEPS), x_init=initial(1), noise=noise)
    assert torch.equal(flow.decode(done.x0), expected)
    # 16 tokens of CLIP and 12 of zeros for the encoder that is not there.
    assert cond.halves("encoder_hidden_states")[0].shape == (1, 28, 32)


def test_replayed_velocities_are_the_recorded_ones_and_the_ratio_is_exactly_one(shared):
    cond, kernel = shared.encode(PROMPTS), FlowSDE(0.7)
    table = shared.rollout(cond, chain(kernel, STEPS), x_init=initial(), noise=noise).transitions
    assert len(table) == 3 * (STEPS - 1)
    for step in range(STEPS - 1):
        rows = rows_of(table, step)
        with torch.no_grad():
            velocity = shared.velocity(rows.x, rows.sigma, cond.take(rows.sample))
        assert torch.equal(velocity, rows.velocity)
        mean = kernel(rows.x, velocity, rows.sigma, rows.sigma_next).mean
        assert torch.equal(mean, rows.mean)
        again = gaussian_log_prob(rows.x_next, mean, rows.std, reduction="mean")
        assert torch.equal((again - rows.mean_log_prob()).exp(), torch.ones_like(again))


def test_with_gradient_the_replay_gives_the_same_bits(shared):
    cond = shared.encode(PROMPTS)
    rows = rows_of(shared.rollout(cond, chain(FlowSDE(0.7), STEPS), x_init=initial(), noise=noise).transitions, 1)
    velocity = shared.velocity(rows.x, rows.sigma, cond)
    assert velocity.requires_grad
    assert torch.equal(velocity.detach(), rows.velocity)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3), DDIM(1.0), CPS(0.8)], ids=lambda kernel: type(kernel).__name__)
def test_a_transition_is_its_kernels_draw(plain_and_guided, kernel):
    flow = plain_and_guided[1.0]
    done = flow.rollout(flow.encode(PROMPTS), chain(kernel, STEPS), x_init=initial(), noise=noise)
    for step in range(STEPS - 1):
        rows = rows_of(done.transitions, step)
        assert torch.equal(rows.sigma, done.sigmas[step].expand(3))
        assert torch.equal(rows.sigma_next, done.sigmas[step + 1].expand(3))
        assert torch.equal(rows.x_next, rows.mean + rows.std.reshape(3, 1, 1, 1) * noise(step))
        if step:
            assert torch.equal(rows.x, rows_of(done.transitions, step - 1).x_next)


@pytest.mark.parametrize("kernel", [FlowSDE(0.0), DanceSDE(0.0), DDIM(0.0), CPS(0.0)], ids=lambda kernel: type(kernel).__name__)
def test_at_noise_level_0_every_kernel_is_the_ode(shared, kernel):
    cond, plan = shared.encode(PROMPTS), Plan(tuple(PlanStep(kernel=kernel) for _ in range(STEPS)))
    x0 = shared.rollout(cond, plan, x_init=initial(), noise=noise).x0
    assert torch.equal(x0, shared.rollout(cond, ode(STEPS), x_init=initial(), noise=noise).x0)


def test_resuming_in_the_middle_equals_going_on(shared):
    cond, plan = shared.encode(PROMPTS), chain(FlowSDE(0.7), STEPS)
    whole = shared.rollout(cond, plan, x_init=initial(), noise=noise)
    resumed = shared.rollout(cond, plan, x_init=rows_of(whole.transitions, 2).x, noise=noise, start=2)
    assert torch.equal(resumed.x0, whole.x0)
    assert torch.equal(resumed.sigmas, whole.sigmas)
    assert resumed.transitions.step.unique().tolist() == [2, 3]
    assert torch.equal(rows_of(resumed.transitions, 3).velocity, rows_of(whole.transitions, 3).velocity)


def test_only_trained_steps_are_kept_and_noise_is_asked_once_for_each_noisy_step(plain_and_guided):
    flow, asked = plain_and_guided[1.0], []
    euler, noisy = PlanStep(kernel=Euler()), PlanStep(kernel=FlowSDE(0.7))
    plan = Plan((euler, PlanStep(kernel=FlowSDE(0.7), is_trained=True), noisy, euler, euler))

    def source(step):
        asked.append(step)
        return noise(step)

    done = flow.rollout(flow.encode(PROMPTS), plan, x_init=initial(), noise=source, batch_size=1)
    assert done.transitions.step.tolist() == [1, 1, 1]
    assert done.transitions.sample.tolist() == [0, 1, 2]
    assert asked == [1, 2]


def test_batches_of_a_rollout_change_nothing_beyond_rounding(shared):
    cond, plan = shared.encode(PROMPTS), chain(FlowSDE(0.7), STEPS)
    whole = shared.rollout(cond, plan, x_init=initial(), noise=noise)
    parts = shared.rollout(cond, plan, x_init=initial(), noise=noise, batch_size=2)
    assert (parts.x0 - whole.x0).abs().max() < 1e-4
    assert parts.transitions.sample.tolist() == whole.transitions.sample.tolist() == [0, 1, 2] * (STEPS - 1)
    assert parts.transitions.step.tolist() == whole.transitions.step.tolist()
    # Rows of one micro-batch, replayed as that micro-batch, are exact again.
    rows = rows_of(parts.transitions, 1).take(torch.tensor([0, 1]))
    with torch.no_grad():
        assert torch.equal(shared.velocity(rows.x, rows.sigma, cond.take(rows.sample)), rows.velocity)


def test_replaying_in_another_batch_agrees_within_rounding(shared):
    cond = shared.encode(PROMPTS)
    table = shared.rollout(cond, chain(FlowSDE(0.7), STEPS), x_init=initial(), noise=noise).transitions
    with torch.no_grad():
        whole = shared.velocity(table.x, table.sigma, cond.take(table.sample))
        parts = [shared.velocity(table.x[i : i + 1], table.sigma[i : i + 1], cond.take(table.sample[i : i + 1])) for i in range(len(table))]
    # Noise levels batched together, or single rows: 1e-5 of a velocity of order 1 moves a mean log-ratio far less than a clip of 1e-4.
    assert (whole - table.velocity).abs().max() < 1e-5
    assert (torch.cat(parts) - table.velocity).abs().max() < 1e-5


def test_every_role_samples_and_a_rollout_leaves_current_in_place(build):
    flow = build()
    cond = flow.encode(PROMPTS)
    base = flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise).x0
    with torch.no_grad():
        for parameter in flow.roles.trainable_parameters():
            parameter += 0.05
    moved = flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise).x0
    assert not torch.equal(moved, base)
    assert torch.equal(flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise, role="reference").x0, base)
    assert torch.equal(flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise).x0, moved)


def test_the_grid_is_the_schedulers_own(shared, folder):
    scheduler = untouched(folder).scheduler
    for num in (STEPS, 3):
        scheduler.set_timesteps(num)
        assert torch.equal(shared.sigmas(num), scheduler.sigmas)
        assert (shared.sigmas(num) - flow_sigmas(num, shift=3.0)).abs().max() < 1e-6
    assert torch.equal(shared.sigmas(), shared.sigmas(STEPS))


def test_a_scheduler_whose_shift_was_changed_afterwards_is_followed(build):
    flow = build()
    flow.pipe.scheduler.set_shift(1.0)
    assert (flow.sigmas() - flow_sigmas(STEPS, shift=3.0)).abs().max() > 0.05
    flow.pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(flow.sigmas(), flow.pipe.scheduler.sigmas)


def test_recorded_timesteps_are_replayed_verbatim_and_others_by_the_rule(build):
    flow = build()
    cond = flow.encode(PROMPTS)
    done = flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    told = []
    handle = flow.denoiser.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    levels, timesteps = flow._known[STEPS]
    # Shown to be looked up rather than computed: a table that the rule contradicts.
    flow._known[STEPS] = (levels, timesteps + 1)
    with torch.no_grad():
        flow.velocity(initial(), torch.stack([done.sigmas[1], torch.tensor(0.123), done.sigmas[3]]), cond)
    handle.remove()
    expected = torch.stack([timesteps[1] + 1, torch.tensor(0.123) * 1000, timesteps[3] + 1])
    assert torch.equal(told[0], expected)


def test_a_rollout_leaves_the_pipeline_as_it_was_also_after_an_error(shared):
    pipe, cond = shared.pipe, shared.encode(PROMPTS)
    before, config = dict(vars(pipe)), dict(pipe.config)
    sigmas = pipe.scheduler.sigmas.clone()

    def boom(step):
        raise RuntimeError("boom")

    shared.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    with pytest.raises(RuntimeError, match="boom"):
        shared.rollout(cond, chain(FlowSDE(0.7), STEPS), x_init=initial(), noise=boom)
    assert vars(pipe).keys() == before.keys()
    assert all(vars(pipe)[name] is value for name, value in before.items())
    assert dict(pipe.config) == config
    assert torch.equal(pipe.scheduler.sigmas, sigmas)
    assert not shared.denoiser._forward_pre_hooks
    assert not shared.denoiser._forward_hooks


def test_torchs_own_generator_is_never_touched(build):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    flow = build(4.5)
    flow.roles.add("old")
    cond = flow.encode(PROMPTS)
    done = flow.rollout(cond, chain(FlowSDE(0.7), STEPS), x_init=initial(), noise=noise)
    flow.velocity(done.x0, torch.tensor(0.3), cond)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_bfloat16_keeps_float32_latents_and_reports_no_gap_for_the_same_batch(build, guidance):
    flow, kernel = build(guidance, dtype="bfloat16"), FlowSDE(0.7)
    cond = flow.encode(PROMPTS)
    table = flow.rollout(cond, chain(kernel, STEPS), x_init=initial(), noise=noise).transitions
    assert table.x.dtype == table.velocity.dtype == table.mean.dtype == torch.float32
    # The state is not rounded: it is not what a bf16 tensor can hold.
    assert not torch.equal(table.x_next, table.x_next.bfloat16().float())
    gaps = {}
    for name, size in (("same batch", 3), ("single rows", 1)):
        worst = 0.0
        for step in range(STEPS - 1):
            for rows in (rows_of(table, step).take(part) for part in torch.arange(3).split(size)):
                with torch.no_grad():
                    velocity = flow.velocity(rows.x, rows.sigma, cond.take(rows.sample))
                mean = kernel(rows.x, velocity, rows.sigma, rows.sigma_next).mean
                again = gaussian_log_prob(rows.x_next, mean, rows.std, reduction="mean")
                worst = max(worst, float((again - rows.mean_log_prob()).abs().max()))
        gaps[name] = worst
    assert gaps["same batch"] == 0
    # Measured on random weights, whose velocity is several times too large; a trained model's gap is smaller.
    assert gaps["single rows"] < 2e-2
