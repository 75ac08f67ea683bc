"""Schedulers of diffusers as an independent implementation."""

import pytest
import torch

from flowalign.core.kernels import DDIM, Euler
from flowalign.core.paths import flow_to_vp, v_prediction_to_velocity, vp_sigma, vp_to_flow
from flowalign.core.schedules import flow_sigmas, flux_mu, flux_sigmas

diffusers = pytest.importorskip("diffusers")


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("steps", [4, 10, 14, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_are_the_grid_of_the_scheduler(steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert (flow_sigmas(steps, shift=shift) - scheduler.sigmas).abs().max() < 1e-6


def test_flux_sigmas_are_the_grid_of_the_scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist(), mu=flux_mu(1024))
    assert (flux_sigmas(6, mu=flux_mu(1024)) - scheduler.sigmas).abs().max() < 1e-6


def test_euler_is_the_step_of_the_scheduler_to_the_last_bit():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x = draw(0, 2, 4, 3, 3, dtype=torch.float32)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = draw(index + 1, 2, 4, 3, 3, dtype=torch.float32)
        ours = Euler()(x, velocity, scheduler.sigmas[index], scheduler.sigmas[index + 1]).mean
        x = scheduler.step(velocity, timestep, x).prev_sample
        assert torch.equal(ours, x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_step_of_the_scheduler_in_flow_coordinates(eta):
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    x_t, v, noise = draw(0, 2, 3), draw(1, 2, 3), draw(2, 2, 3)
    now, then = (int(step) for step in scheduler.timesteps[4:6])
    abar = scheduler.alphas_cumprod.double()
    scheduler.alphas_cumprod = abar
    theirs = scheduler.step(v, now, x_t, eta=eta, variance_noise=noise).prev_sample
    (a, b), (a_next, b_next) = ((abar[step].sqrt(), (1 - abar[step]).sqrt()) for step in (now, then))
    velocity = v_prediction_to_velocity(v, x_t, a, b)
    step = DDIM(eta)(vp_to_flow(x_t, a, b), velocity, vp_sigma(a, b), vp_sigma(a_next, b_next))
    ours = flow_to_vp(step.mean, a_next, b_next) + (a_next + b_next) * step.std * noise
    assert (ours - theirs).abs().max() < 1e-12
