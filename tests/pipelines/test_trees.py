"""Plans that fork, through the pipeline's own call: the same as a plain loop over velocities, and nothing evaluated twice."""

import pytest
import torch

from flowalign.core.kernels import Euler, FlowSDE
from flowalign.core.plans import fork, ode, tree
from flowalign.core.rollout import rollout
from tests.pipelines.conftest import STEPS
from tests.pipelines.tiny import EVENT, PROMPTS, initial, noise

SDE = FlowSDE(0.7)
PLANS = {
    "fork": fork(SDE, STEPS, num_children=2),
    "fork in a window": fork(SDE, STEPS, num_children=3, steps=range(1, 3)),
    "noisy path and completions": fork(SDE, STEPS, num_children=2, path=SDE, completion=SDE),
    "tree": tree(SDE, STEPS, depths=(0, 2), num_children=2),
}


def source(plan):
    def draw(step):
        rows = 3 * len(plan.drawn(step))
        return torch.randn(rows, *EVENT, generator=torch.Generator().manual_seed(900 + step))

    return draw


def test_a_bare_tree_is_what_a_loop_over_replayed_velocities_makes(shared):
    cond = shared.encode(PROMPTS)
    for name, plan in PLANS.items():
        drawn = source(plan)
        rows = []

        def count(module, args, kwargs, output, rows=rows):
            rows.append(len(kwargs["hidden_states"]))

        handle = shared.denoiser.register_forward_hook(count, with_kwargs=True)
        done = shared.rollout(cond, plan, x_init=initial(), noise=drawn, batch_size=4)
        handle.remove()
        assert sum(rows) == done.evaluations * shared.rows_per_evaluation == 3 * plan.evaluations * shared.rows_per_evaluation, name

        def velocity(x, sigma, plan=plan):
            # States are children of prompts in order, each with equally many.
            return shared.velocity(x, sigma, cond.take(torch.arange(3).repeat_interleave(len(x) // 3)))

        with torch.no_grad():
            plain = rollout(velocity, initial(), shared.sigmas(STEPS), plan, drawn)
        assert (done.x0 - plain.x0).abs().max() < 1e-4, name
        for column in ("step", "seed", "state", "sample", "num_leaves", "parent"):
            assert torch.equal(vars(done.transitions)[column], vars(plain.transitions)[column]), (name, column)
        assert (done.transitions.x_next - plain.transitions.x_next).abs().max() < 1e-4


def test_a_child_is_completed_from_its_stored_state_and_the_path_is_the_ode(shared):
    cond, plan = shared.encode(PROMPTS), PLANS["fork"]
    done = shared.rollout(cond, plan, x_init=initial(), noise=source(plan))
    assert done.x0.shape[0] == 3 * plan.num_leaves
    trunk = shared.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    rows = done.transitions
    for step in range(STEPS - 1):
        here = rows.take((rows.step == step).nonzero().squeeze(1))
        if step + 1 < STEPS:
            alone = shared.rollout(cond.take(here.seed), ode(STEPS), x_init=here.x_next, noise=noise, start=step + 1)
            assert (alone.x0 - done.x0[here.sample]).abs().max() < 1e-4
        # Both children start from one state of the path, which the ODE's rollout goes through.
        assert torch.equal(here.x[0::2], here.x[1::2])
        resumed = shared.rollout(cond, ode(STEPS), x_init=here.x[0::2], noise=noise, start=step)
        assert (resumed.x0 - trunk.x0).abs().max() < 1e-4


def test_timesteps_of_a_call_that_was_left_are_replayed_verbatim(build):
    flow = build()
    cond = flow.encode(PROMPTS)
    flow.rollout(cond, PLANS["fork"], x_init=initial(), noise=source(PLANS["fork"]))
    levels, timesteps = flow._known[STEPS]
    assert torch.equal(levels, flow.sigmas(STEPS)[:-1])
    assert len(timesteps) == STEPS


def test_an_edit_is_noticed_in_a_call_that_is_left_early(shared):
    cond, plan = shared.encode(PROMPTS), PLANS["fork"]
    honest = shared.pipe.__class__.__call__

    def edited(self, **arguments):
        def callback(pipe, step, timestep, values):
            return {"latents": values["latents"] + (0.1 if step == 0 else 0)}

        return honest(self, **arguments, callback_on_step_end=callback)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.pipe.__class__, "__call__", edited)
        with pytest.raises(ValueError, match="edited its latents before step 1"):
            shared.rollout(cond, plan, x_init=initial(), noise=source(plan))


def test_the_ode_of_a_path_asks_for_the_noise_of_children_alone(shared):
    cond, asked = shared.encode(PROMPTS), []
    plan = fork(SDE, STEPS, num_children=2, steps=range(1, 2), path=Euler())
    drawn = source(plan)
    shared.rollout(cond, plan, x_init=initial(), noise=lambda step: asked.append(step) or drawn(step))
    assert asked == [1]
