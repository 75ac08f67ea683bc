"""The shapes of plans: counts against formulas and against what is really evaluated, the flat table against a walk by hand."""

import pytest
import torch

from flowalign.core.kernels import CPS, DDIM, DanceSDE, Euler, FlowSDE
from flowalign.core.plans import Fork, Plan, PlanStep, chain, fork, ode, progressive_start, tree, window
from flowalign.core.rollout import rollout
from flowalign.core.schedules import linear_sigmas
from flowalign.core.worlds import GaussianWorld

WORLD, SDE = GaussianWorld(0.0, 1.0), FlowSDE(0.7)
both = PlanStep(kernel=SDE, num_children=2, is_trained=True, fork=Fork(kernel=SDE, num_children=3))
PLANS = {
    "chain": chain(SDE, 5),
    "ode": ode(5),
    "window": window(SDE, 5, start=1, size=2),
    "fork": fork(SDE, 5, num_children=3),
    "fork in a window": fork(SDE, 5, num_children=3, steps=range(1, 3)),
    "fork at the last step too": fork(SDE, 5, num_children=2, steps=range(5)),
    "noisy everywhere": fork(SDE, 5, num_children=2, path=SDE, completion=SDE),
    "tree": tree(SDE, 5, depths=(0, 2), num_children=2),
    "fork beside a tree": Plan((PlanStep(kernel=Euler()), both, PlanStep(kernel=SDE, is_trained=True), PlanStep(kernel=Euler()))),
}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(plan, num=2, velocity=WORLD.velocity):
    sigmas = linear_sigmas(plan.num_steps, dtype=torch.float64)
    return rollout(velocity, draw(0, num, 3), sigmas, plan, lambda step: draw(step + 1, num * len(plan.drawn(step)), 3))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_is_evaluated_is_what_the_plan_counts(plan):
    rows = []
    done = run(plan, velocity=lambda x, sigma: rows.append(len(x)) or WORLD.velocity(x, sigma))
    assert sum(rows) == done.evaluations == 2 * plan.evaluations
    assert len(torch.unique(done.transitions.state)) == 2 * plan.training_evaluations
    assert len(done.x0) == 2 * plan.num_leaves == 2 * len(plan.forked_at())


def test_counts_are_those_of_the_formulas():
    for n, k in ((10, 6), (5, 3), (2, 4)):
        plan = fork(SDE, n, num_children=k)
        assert plan.evaluations == (n - 1) + k * n * (n - 1) // 2
        assert (plan.training_evaluations, plan.num_leaves) == (n - 1, k * (n - 1))
    # Four noises x six children: what the released code spends on a group of TempFlow, against 240 for Flow-GRPO.
    assert 4 * fork(SDE, 10, num_children=6).evaluations == 36 + 1080
    assert tree(SDE, 6, depths=(0, 3), num_children=2).evaluations == 1 + 2 * 3 + 4 * 2
    assert window(SDE, 10, start=2, size=3).training_evaluations == 3


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_final_state_can_be_walked_from_its_rows(plan):
    """Follow each final state through the table: rows chain up by state and parent, and the steps between them are the kernels'."""
    done = run(plan)
    table, sigmas = done.transitions, done.sigmas
    row, leaf = table.leaves()
    for end in range(len(done.x0)):
        mine = row[leaf == end].tolist()
        left = plan.forked_at()[end % plan.num_leaves]
        steps = [i for i, s in enumerate(plan.steps) if (s.is_trained and (left < 0 or i < left)) or i == left]
        assert [int(table.step[r]) for r in mine] == steps
        assert [int(table.parent[r]) for r in mine] == [-1, *mine][: len(mine)]
        assert all(int(table.seed[r]) == end // plan.num_leaves for r in mine)
        if mine and plan in (PLANS["fork"], PLANS["fork in a window"]):
            x = table.x_next[mine[-1]][None]
            for i in range(left + 1, plan.num_steps):
                x = Euler()(x, WORLD.velocity(x, sigmas[i]), sigmas[i], sigmas[i + 1]).mean
            assert (x[0] - done.x0[end]).abs().max() < 1e-14


def test_children_of_a_state_share_it_and_differ_by_their_noise_alone():
    plan = PLANS["fork"]
    table = run(plan).transitions
    for state in torch.unique(table.state):
        rows = table.take((table.state == state).nonzero().squeeze(1))
        assert len(rows) == 3
        assert (rows.x == rows.x[0]).all()
        assert (rows.mean == rows.mean[0]).all()
        places = torch.searchsorted(torch.tensor(plan.drawn(int(rows.step[0]))), rows.sample % plan.num_leaves)
        noise = draw(int(rows.step[0]) + 1, 6, 3)[rows.seed * 3 + places]
        assert (rows.x_next - rows.mean - rows.std[:, None] * noise).abs().max() < 1e-15


def test_completing_a_stored_state_costs_what_is_left_and_ends_where_the_rollout_did():
    done = run(chain(SDE, 5))
    rows = done.transitions.take((done.transitions.step == 3).nonzero().squeeze(1))
    calls = []
    again = rollout(
        lambda x, s: calls.append(1) or WORLD.velocity(x, s), rows.x, done.sigmas, chain(SDE, 5), lambda i: draw(i + 1, 2, 3), start=3
    )
    assert len(calls) == 2
    assert torch.equal(again.x0, done.x0)
    assert torch.equal(again.transitions.x_next, rows.x_next)


def test_a_tree_can_be_completed_from_the_middle():
    plan = PLANS["tree"]
    done = rollout(
        WORLD.velocity,
        draw(0, 2, 3),
        linear_sigmas(5, dtype=torch.float64),
        plan,
        lambda i: draw(i, 2 * len(plan.drawn(i, 1)), 3),
        start=1,
    )
    assert len(done.x0) == 2 * 2
    assert done.transitions.num_leaves.tolist() == [2] * 2 + [1] * 8
    assert done.transitions.parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 3, 4, 5]


def test_progressive_windows_are_those_of_the_released_scheduler_but_never_shrink():
    starts = {step: progressive_start(step, size=4, limit=23) for step in (0, 24, 25, 50, 475, 499, 500, 524, 525)}
    assert starts == {0: 0, 24: 0, 25: 1, 50: 2, 475: 19, 499: 19, 500: 0, 524: 0, 525: 1}
    # A stride that does not divide the way: the last window is still whole, and reached.
    assert [progressive_start(25 * i, size=4, limit=9, stride=2) for i in range(5)] == [0, 2, 4, 5, 0]
    for step in range(0, 2000, 7):
        assert window(SDE, 25, start=progressive_start(step, size=4, limit=24), size=4).trained[-1] < 24


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fork(SDE, 5, num_children=0), "num_children: got 0"),
        (lambda: fork(Euler(), 5, num_children=2), "Euler without noise.*needed FlowSDE"),
        (lambda: fork(DanceSDE(0.0), 5, num_children=2), "DanceSDE without noise"),
        (lambda: fork(SDE, 5, num_children=2, steps=range(3, 6)), r"got steps \[3, 4, 5\] for 5 steps"),
        (lambda: fork(SDE, 1, num_children=2), "got 1 steps, needed at least 2"),
        (lambda: fork(CPS(0.8), 5, num_children=2, steps=range(5)), "step 4 is the last one, where CPS has no noise"),
        (lambda: window(DDIM(1.0), 5, start=3, size=2), "step 4 is the last one, where DDIM has no noise"),
        (lambda: window(SDE, 5, start=4, size=2), "window: got start 4 and size 2 for 5 steps"),
        (lambda: progressive_start(0, size=6, limit=5), "got size 6, needed 1 to 5"),
        (lambda: progressive_start(0, size=2, limit=5, every=0), "got a move of 1 steps after 0"),
        (lambda: tree(SDE, 5, depths=(0, 4), num_children=2), "cannot be deeper than the schedule"),
        (lambda: tree(SDE, 5, depths=(0, 7), num_children=2), "cannot be deeper than the schedule"),
        (lambda: tree(SDE, 5, depths=(1, 1), num_children=2), "different ones"),
        (lambda: tree(SDE, 5, depths=(1,), num_children=1), "for no branches use chain"),
        (lambda: Plan((PlanStep(kernel=SDE),), keeps_path=False), "no final state"),
        (lambda: PLANS["fork"].without_training(), "the plan forks"),
        (lambda: PlanStep(kernel=SDE, is_trained=True, fork=Fork(kernel=DDIM(1.0), num_children=2)), "another kernel"),
        (lambda: rollout(WORLD.velocity, draw(0, 1, 1), linear_sigmas(5), ode(5), lambda i: None, start=5), r"start: got 5.*\[0, 5\)"),
    ],
)
def test_plans_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_chain_may_train_some_of_its_steps():
    assert chain(SDE, 6, trained=(1, 4)).trained == (1, 4)
    assert [step.kernel for step in chain(SDE, 6, trained=(1,)).steps] == [SDE] * 6
    assert chain(SDE, 6, train_last=True, trained=(5,)).trained == (5,)
    for chosen in ((5,), (-1,), (2, 7)):
        with pytest.raises(ValueError, match=r"chain.trained: got .*, needed steps of 0 to 4"):
            chain(SDE, 6, trained=chosen)
    for kernel in (CPS(0.8), DDIM(1.0)):
        with pytest.raises(ValueError, match="chain: step 5 is the last one, where .* has no noise"):
            chain(kernel, 6, train_last=True)
