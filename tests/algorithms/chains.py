"""The linear-Gaussian chain: N(0, 1) data, the exact velocity plus one parameter for each step, reward x0; everything in float64."""

import math

import torch

from flowalign.core.algorithm import Experience, Rows, Update
from flowalign.core.kernels import Euler
from flowalign.core.randomness import generator
from flowalign.core.rollout import rollout
from flowalign.core.schedules import flow_sigmas
from flowalign.core.worlds import GaussianWorld
from flowalign.train.forests import compared_groups

ODE = Euler()
WORLD = GaussianWorld(0.0, 1.0)


def draw(*name_and_shape):
    *name, shape = name_and_shape
    return torch.randn(*shape, generator=generator("chain", *name), dtype=torch.float64)


def slopes(kernel, following, num_steps=10):
    """Exact response of E[x0] to each step's parameter, and of x0 to each step's noise."""
    sigmas, one = flow_sigmas(num_steps, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    grid = list(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True))
    factors = [following(one, WORLD.velocity(one, now), now, then).mean.item() for now, then in grid]
    to_velocity, to_noise = [], []
    for k, (now, then) in enumerate(grid):
        step, moved = kernel(one, 0 * one, now, then), kernel(one, one, now, then)
        later = math.prod(factors[k + 1 :])
        to_velocity.append((moved.mean - step.mean).item() * later)
        to_noise.append(step.std.item() * later)
    return to_velocity, to_noise


def play(
    algorithm,
    *,
    groups,
    members,
    num_steps=10,
    step=0,
    same_latent=False,
    name="",
    advantage=None,
    sigmas=None,
    width=1,
    x_init=None,
    noise=None,
    velocity=WORLD.velocity,
):
    """Roll out under the exact velocity and compare final states by their reward: plain differences to the mean of the compared group.

    ``noise`` maps a step and a number of rows to their noise; by default every row has its own.
    """
    sigmas = flow_sigmas(num_steps, dtype=torch.float64) if sigmas is None else sigmas
    plan = algorithm.plan(step, num_steps, 0)
    x = draw(name, "x", (groups * members, width))
    x = x[::members].repeat_interleave(members, 0) if same_latent else x
    x = x if x_init is None else x_init
    noise = noise or (lambda i, rows: draw(name, i, (rows, width)))
    done = rollout(velocity, x, sigmas, plan, lambda i: noise(i, groups * members * len(plan.drawn(i))))
    group = torch.arange(groups).repeat_interleave(members)
    compared = compared_groups(plan, group, torch.arange(groups * members) % members)
    number = torch.unique(compared, return_inverse=True)[1]
    reward = done.x0.mean(1)
    mean = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add(0, number, reward) / torch.bincount(number)
    value = (reward - mean[number]) if advantage is None else advantage(reward, number)
    leaves = plan.num_leaves
    return Experience(
        trajectory=done,
        advantage=value[:, None],
        weight=torch.ones(len(reward), 1, dtype=torch.float64),
        keep=torch.ones(len(reward), dtype=torch.bool),
        prompt=group.repeat_interleave(leaves),
        group=group.repeat_interleave(leaves),
        sample=torch.arange(len(reward)) % (members * leaves),
    )


def gradients(algorithm, experience, *, apart=False):
    """Gradient of minus the losses at each state, or of each row, in a parameter of its own: rows, steps, values and the loss."""
    rows = algorithm.rows(experience, Update(seed=0, step=0, index=0))
    rows = Rows(sample=rows.sample, columns=rows.columns) if apart else rows
    theta = torch.zeros(len(rows.states()[0]), 1, dtype=torch.float64, requires_grad=True)
    loss = algorithm.loss("current", rows, lambda x, sigma, sample, role: WORLD.velocity(x, sigma) + theta * (role == "current"))
    (found,) = torch.autograd.grad(-loss.value.sum(), theta)
    first, _ = rows.states()
    sigmas = experience.trajectory.sigmas
    steps = torch.searchsorted(-sigmas, -rows["sigma"][first])
    return rows, steps, found[:, 0], loss
