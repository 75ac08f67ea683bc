"""What estimators read besides rewards: each table against a plain computation, and what a run that cannot give it says."""

import math

import pytest
import torch
from accelerate import Accelerator

from flowalign.core.algorithm import Update
from flowalign.core.plans import ode
from flowalign.estimators import config as recipe_config
from flowalign.estimators import names, recipe
from flowalign.estimators.diversity import group_novelty
from flowalign.run import build_trainer
from flowalign.run_config import load_config
from flowalign.train.scoring import score
from flowalign.train.tables import features

FLOW_GRPO = {"type": "flow_grpo", "num_minibatches": 1}
SAMPLES = 8


def build(write_config, **changes):
    return build_trainer(load_config(str(write_config(**changes))), Accelerator())


def spy(built, monkeypatch):
    """Keep the batch that the estimator gets; it then answers as the plain mean would."""
    seen = []
    honest = type(built.collector.estimator).update

    def update(estimator, batch, state):
        seen.append(batch)
        return honest(estimator, batch, state)

    monkeypatch.setattr(type(built.collector.estimator), "update", update)
    return seen


def scores(built, found, x0):
    prompts = built.draw(0)
    texts, records = [p.text for p in prompts for _ in range(4)], [p.metadata for p in prompts for _ in range(4)]
    return score(built.rewards, built.pipeline.decode(x0), texts, records).values


def cond_of(built):
    return built.pipeline.encode([p.text for p in built.draw(0) for _ in range(4)])


# -- the tables ------------------------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_reward_of_the_ode_from_the_same_noise(write_config, monkeypatch):
    built = build(write_config, algorithm=FLOW_GRPO, advantage="remax")
    seen = spy(built, monkeypatch)
    found = built.collect(0)
    start = found.experience.trajectory.x_init
    alone = built.pipeline.rollout(cond_of(built), ode(4), x_init=start, noise=lambda step: start)
    assert torch.allclose(seen[0].baseline, scores(built, found, alone.x0), atol=1e-6)
    expected = (seen[0].rewards - seen[0].baseline).sum(1)
    assert torch.allclose(found.experience.advantage[:, 0].double(), expected, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_log_probs_are_those_of_the_recorded_steps(write_config, monkeypatch):
    built = build(write_config, algorithm=FLOW_GRPO, advantage={"type": "tw_grpo", "of": "log_prob"})
    seen = spy(built, monkeypatch)
    rows = built.collect(0).experience.trajectory.transitions
    table = seen[0].log_prob
    assert table.shape == (SAMPLES, 3)  # four steps, the last is not trained
    for sample, step, value in zip(rows.sample.tolist(), rows.step.tolist(), rows.mean_log_prob().double(), strict=True):
        assert table[sample, step] == value


@pytest.mark.parametrize("way", ["completion", "prediction"])
def test_step_rewards_value_the_state_that_the_step_starts_from(write_config, monkeypatch, way):
    small = {"groups": 2, "group_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2, "step_rewards": way}
    built = build(write_config, algorithm=FLOW_GRPO, advantage="turning_point", train=small)
    seen = spy(built, monkeypatch)
    found = built.collect(0)
    rows = found.experience.trajectory.transitions
    assert seen[0].step_rewards.shape == (SAMPLES, 3, 2)
    for step in range(3):
        part = rows.take((rows.step == step).nonzero()[:, 0])
        if way == "prediction":
            x0 = part.x - part.sigma.view(-1, 1, 1, 1) * part.velocity
        else:
            x0 = built.pipeline.rollout(cond_of(built), ode(4), x_init=part.x, noise=lambda i: None, start=step).x0
        assert torch.allclose(seen[0].step_rewards[:, step], scores(built, found, x0), atol=1e-6)
    assert found.experience.advantage.shape == (SAMPLES, 3)


def test_metrics_are_columns_in_the_order_that_is_written(write_config, monkeypatch):
    metrics = ["novelty", {"reward": "tests.train.brightness"}]
    built = build(write_config, metrics=metrics, rewards=[{"reward": {"type": "shapes"}}], advantage={"type": "canon", "metric": 1})
    seen = spy(built, monkeypatch)
    found = built.collect(0)
    small = features(found.images)
    for row in range(SAMPLES):
        others = [other for other in range(SAMPLES) if other // 4 == row // 4 and other != row]
        distances = [math.sqrt(float((small[row] - small[other]).square().mean())) for other in others]
        assert seen[0].metric[row, 0] == pytest.approx(sum(distances) / 3)
    assert torch.equal(seen[0].metric[:, 1], found.images.double().mean((1, 2, 3)))
    line = built.step(0)
    assert line["metric"].keys() == {"novelty", "brightness"}
    assert line["reward"].keys() == {"shapes"}


def test_novelty_does_not_depend_on_the_order_of_the_samples_and_needs_another_one():
    values, group = torch.randn(7, 5), torch.tensor([3, 9, 3, 9, 3, 4, 9])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    found = group_novelty(values, group)
    assert torch.allclose(group_novelty(values[order], group[order]), found[order], equal_nan=True)
    assert torch.isnan(found).tolist() == [False] * 5 + [True, False]


def test_a_table_that_is_not_asked_for_is_not_made(write_config, monkeypatch):
    built = build(write_config, algorithm=FLOW_GRPO, advantage="grpo")
    seen = spy(built, monkeypatch)
    calls = []
    honest = built.pipeline.rollout
    monkeypatch.setattr(built.pipeline, "rollout", lambda *a, **k: calls.append(1) or honest(*a, **k))
    built.collect(0)
    batch = seen[0]
    assert [batch.baseline, batch.log_prob, batch.step_rewards, batch.metric] == [None] * 4
    assert len(calls) == 1


# -- every recipe ----------------------------------------------------------------------------------------------------------------

METRICS = ["novelty", {"reward": "tests.train.brightness"}]
OPTIONS = {"trust_grpo": {}, "heron": {}, "weighted_grpo": {"band": 0.5}, "bpo": {"eps_low": 1e-3, "eps_high": 1e-3}}
ELSEWHERE = {"anchor_id", "tree", "step_judge"}  # what only a fork or a judge has


def test_the_needs_of_stages_are_what_recipes_claim():
    for name in names():
        assert set(recipe_config(name).claims.needs) == set(recipe(name).needs) - {"clauses_valid", "step_judge"}, name


@pytest.mark.parametrize("name", [name for name in names() if not ELSEWHERE & recipe(name).needs])
def test_every_recipe_that_needs_no_fork_and_no_judge_trains(write_config, name):
    claims = recipe_config(name).claims
    brightness, verifier = {"type": "tests.train.brightness", "binary": claims.domain == "binary"}, {"type": "shapes", "strict": 0.0}
    used = [verifier] if "clauses" in claims.needs else [brightness, verifier] if claims.num_rewards > 1 else [brightness]
    rewards = [{"reward": reward} for reward in used]
    algorithm = {**FLOW_GRPO, "link": "bounded_ratio" if name == "bpo" else "ppo_clip"}
    advantage = {"type": name, **OPTIONS.get(name, {})}
    built = build(write_config, algorithm=algorithm, advantage=advantage, metrics=METRICS, rewards=rewards)
    line = built.step(0)
    assert math.isfinite(line["metrics"]["loss"])
    assert math.isfinite(line["grad_norm"])


@pytest.mark.parametrize(
    ("algorithm", "advantage", "message"),
    [
        ("awm", "remax", "the algorithm samples by the ODE itself; choose an algorithm that trains the noisy steps"),
        ("awm", "process", "needs step_rewards of trained steps, but the algorithm trains final images alone"),
        ("awm", {"type": "tw_grpo", "of": "log_prob"}, "needs log_prob of trained steps"),
        ("flow_grpo", "canon", r"needs a metric, but the run has none; add `metrics: \[novelty\]`"),
        ("flow_grpo", "process", "needs a judge's reward for each step"),
        ("flow_grpo", "branch_grpo", "needs tree, which only a rollout that forks has"),
        ("flow_grpo", "gigpo", "needs anchor_id, which only a rollout that forks has"),
    ],
)
def test_a_run_that_cannot_give_a_table_is_refused_before_it_begins(write_config, algorithm, advantage, message):
    with pytest.raises(ValueError, match=message):
        build(write_config, algorithm=algorithm, advantage=advantage)


# -- ratios to reach -------------------------------------------------------------------------------------------------------------


def test_the_loss_of_bounded_ratios_is_the_distance_to_the_target_times_the_size_of_the_advantage(write_config):
    algorithm = {**FLOW_GRPO, "link": "bounded_ratio", "kl_penalty": 0.0}
    built = build(write_config, algorithm=algorithm, advantage={"type": "bpo", "eps_low": 1e-2, "eps_high": 1e-2})
    found = built.collect(0)
    experience = found.experience
    rows = built.algorithm.rows(experience, Update(seed=0, step=0, index=0))
    loss = built.algorithm.loss("current", rows, found.velocity).value
    # On-policy every ratio is 1.
    expected = ((1 - experience.target).abs() * experience.advantage.abs())[experience.trajectory.transitions.sample, 0]
    assert torch.allclose(loss.detach(), expected, atol=1e-6)
    assert expected.max() > 1e-3
    assert 1 - 1e-2 <= experience.target.min() < 1 < experience.target.max() <= 1 + 1e-2


@pytest.mark.parametrize(
    ("algorithm", "advantage", "message"),
    [
        ({"type": "awm", "levels": "uniform"}, "bpo", "gives ratios to reach, which awm has no use for"),
        (FLOW_GRPO, "bpo", "is ppo_clip, but the estimator gives ratios to reach"),
        ({**FLOW_GRPO, "link": "bounded_ratio"}, "grpo", "is bounded_ratio, but the estimator gives no ratios to reach"),
    ],
)
def test_targets_and_links_that_do_not_belong_together_are_refused_before_the_first_rollout(write_config, algorithm, advantage, message):
    with pytest.raises(ValueError, match=message):
        build(write_config, algorithm=algorithm, advantage=advantage)


def test_what_metrics_cannot_score_is_refused_before_anything_is_sampled(write_config):
    with pytest.raises(ValueError, match=r"reward 'ocr' cannot score"):
        build(write_config, metrics=[{"reward": {"type": "ocr"}}], rewards=[{"reward": "tests.train.brightness"}])
    with pytest.raises(ValueError, match="keep_best_by: got 'brightnes', but what is logged is brightness, diversity, .*; add it"):
        build(
            write_config, rewards=[{"reward": "tests.train.brightness"}], train={"groups": 2, "group_size": 4, "keep_best_by": "brightnes"}
        )
