"""What is refused before anything is sampled: options, orders of stages, and tables of a wrong shape. And that ``explain`` leaves nothing out."""

import contextlib
import dataclasses
import typing

import pytest
import torch

from flowalign.estimators import RewardBatch, config, explain, from_config, names, recipe

CHOICES = [
    (name, option)
    for name in names()
    for option, kind in typing.get_type_hints(config(name)).items()
    if typing.get_origin(kind) is typing.Literal
]
FIELDS = [(name, field.name) for name in names() for field in dataclasses.fields(config(name))]


@pytest.mark.parametrize(("name", "option"), CHOICES)
def test_every_choice_refuses_a_word_that_is_none(name, option):
    with pytest.raises(ValueError, match=f"{option}: unknown value 'nearly'"):
        recipe(name, **{option: "nearly"})


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, option in FIELDS if option in ("ddof", "eps")])
def test_every_standard_deviation_refuses_a_negative_ddof_or_eps(name, option):
    with pytest.raises(ValueError, match=f"recipe '{name}': {option}: got -1"):
        recipe(name, **{option: -1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pareto", {"select": "fornt"}, "did you mean 'front'"),
        ("tree_rpo", {"baseline": "sibling"}, "did you mean 'siblings'"),
        ("tw_grpo", {"of": "log_probs"}, "did you mean 'log_prob'"),
        ("grpo", {"ddof": 0.5}, "ddof: got 0.5, needed a whole number"),
        ("grpo", {"ddof": True}, "ddof: got True, needed a whole number"),
        ("grpo", {"eps": "small"}, "eps: got 'small', needed a number"),
        ("gdpo", {"reward_weights": 1.0}, "reward_weights: got 1.0, needed a list"),
        ("gdpo", {"reward_weights": [1.0, "x"]}, r"reward_weights\[1\]: got 'x', needed a number"),
        ("heron", {"margins": [0.1, "x"]}, r"margins\[1\]: got 'x', needed a number"),
        ("flow_grpo", {"clip": float("nan")}, "clip: got nan, needed a finite number"),
        ("grpo", {"reward_weights": [float("inf")]}, r"reward_weights\[0\]: got inf, needed a finite number"),
        ("epo", {"anneal_steps": 0}, "anneal_steps: got 0, needed at least 1"),
        ("trust_grpo", {"decay_steps": 0.0}, "decay_steps: got 0, needed a positive number"),
        ("hypervolume", {"size": 0}, "size: got 0, needed at least 1"),
        ("verpo", {"prior": -1.0}, "prior: got -1, needed at least 0"),
        ("unlikeliness", {"beta": 7.0}, r"beta: got 7, needed a number in \[0, 1\]"),
        ("gigpo", {"discount": 5.0}, r"discount: got 5, needed a number in \[0, 1\]"),
        ("ssb", {"alpha": -2.0}, "alpha: got -2, needed at least 0"),
        ("pareto", {"box": -1.0}, "box: got -1, needed at least 0"),
        ("heron", {"margins": -1.0}, "margins: got -1, needed at least 0"),
        ("adora", {"damping": -1.0}, r"damping: got -1, needed a number in \[0, 1\]"),
        ("steer", {"strength": float("nan")}, "strength: got nan"),
        ("odsw", {"reward": -1}, "reward: got -1, needed at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_when_the_recipe_is_built(name, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(name, **options)


STD = {"stage": "scale_by_std", "ddof": 1, "eps": 1e-4}
WEIGH = {"stage": "weigh_rewards", "weights": [1.0, 7.0]}
COMBINED = ["combine_rewards", "center"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["combine_rewards", {"stage": "center", "over": "grup"}], "did you mean 'group'"),
        ([*COMBINED, {"stage": "scale_by_std", "ddof": 0, "eps": 1e-4, "of": "residuals"}], "did you mean 'residual'"),
        ([*COMBINED, {"stage": "scale_by_std", "ddof": 0, "eps": 1e-4, "over": "bach"}], "did you mean 'batch'"),
        ([*COMBINED, {"stage": "scale_by_std", "ddof": 0, "eps": 1e-4, "rule": "ad"}], "did you mean 'add'"),
        (["center", {"stage": "combine_advantages", "missing": "zeros"}], "did you mean 'zero'"),
        ([*COMBINED, {"stage": "keep_front", "over": "tree"}], "unknown value 'tree'"),
        ([*COMBINED, {"stage": "renormalise", "ddof": -1}], "ddof: got -1"),
        ([*COMBINED, {"stage": "scale_by_std", "eps": 1e-4}], "missing a required .*'ddof'"),
    ],
)
def test_stages_of_a_configuration_are_refused_with_their_place(stages, message):
    with pytest.raises(ValueError, match=rf"^advantage\[\d\] \(\w+\): .*{message}"):
        from_config([*stages, "broadcast_steps"])


def test_a_segmentation_asks_for_the_table_that_it_is_cut_by():
    assert from_config(["combine_rewards", "broadcast_steps", {"stage": "center", "over": "anchor"}]).needs == {"anchor_id"}
    assert from_config(["combine_rewards", {"stage": "leave_one_out", "over": "tree"}, "broadcast_steps"]).needs == {"tree"}
    assert recipe("grpo").needs == set()


def other(kind, value):
    """Another value of an option, as far as its kind tells."""
    if typing.get_origin(kind) is typing.Literal:
        return [choice for choice in typing.get_args(kind) if choice != value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [new for new in (value / 2, value + 0.25) if new != value]
    wanted = str(kind)
    return [[1.0, 0.0]] if "float, ..." in wanted else [[1, 0]] if "int, ..." in wanted else [1] if "int" in wanted else [0.5]


@pytest.mark.parametrize(("name", "option"), FIELDS)
def test_explain_shows_every_option(name, option):
    made = config(name)
    kind, default = typing.get_type_hints(made)[option], vars(made())[option]
    others = {"strength": 0.2} if (name, option) == ("steer", "curve") else {}  # the default's strength suits one curve only
    texts = set()
    for value in other(kind, default):
        with contextlib.suppress(ValueError):  # some values mean nothing to some recipes; one of them must
            texts.add(explain(name, **{option: value}, **others))
    assert texts, "no other value was taken"
    assert explain(name, **others) not in texts


NO_OPS = {
    "weights before a std of each reward": [WEIGH, "center", STD, "combine_advantages"],
    "weights before win rates": [WEIGH, "win_rate", "center", "combine_advantages"],
    "weights before fronts": [WEIGH, "pareto_rank", "center"],
    "weights before an order of importance": [WEIGH, "hierarchy", "center"],
    "weights before stds of groups and trees": [
        WEIGH,
        {"stage": "compare_in_groups_and_trees", "ddof": 0, "eps": 0.0},
        "combine_advantages",
    ],
    "one factor before a std": ["combine_rewards", "weigh_by_hypervolume", "center", STD],
    "one factor before a renormalisation": ["combine_rewards", "center", STD, "weigh_by_hypervolume", "renormalise"],
    "one factor before signs": ["combine_rewards", "center", "weigh_by_hypervolume", "sign"],
    "sizes of outcomes before a std": ["combine_rewards", {"stage": "signed_outcome", "negative": 2.0}, "center", STD],
    "factors of groups before a std of groups": [
        "combine_rewards",
        "center",
        "damp_unless_elaborate",
        {"stage": "renormalise", "over": "group"},
    ],
    "a share of lively groups before a renormalisation": ["combine_rewards", "center", "scale_by_contrast", "renormalise"],
    "a constant before signs": ["combine_rewards", "center", {"stage": "scale_by_constant", "value": 10.0}, "sign"],
    "weights before step rewards of their own": [WEIGH, "take_step_rewards", "combine_rewards", "center"],
    "factors of groups before signs": ["combine_rewards", "center", "damp_unless_elaborate", "sign"],
}


@pytest.mark.parametrize("what", NO_OPS)
def test_a_weight_that_would_be_undone_is_refused(what):
    with pytest.raises(ValueError, match="standard deviations, ranks and signs undo weights given before them"):
        from_config([*NO_OPS[what], "broadcast_steps"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["combine_rewards", "take_step_rewards", "center"], "takes rewards 'several'"),
        (["affine", "subtract_given", "combine_advantages"], "shape nothing before it"),
        ([{"stage": "affine", "high": 2.0}, "chain_differences"], "shape nothing before it"),
        (["combine_rewards", "weigh_by_difficulty", "node_values", "subtract_parent", "edges_to_steps"], "give those at the end"),
        (["combine_rewards", "center", "target_ratio", "node_values", "add_gain", "edges_to_steps"], "give those at the end"),
        (["combine_rewards", "center", "to_probability", "sign"], "got phase 'probability'"),
        (["combine_rewards", "center", "to_probability", "renormalise"], "got phase 'probability'"),
    ],
)
def test_stages_that_would_read_something_else_than_is_meant_are_refused(stages, message):
    last = [] if "edges_to_steps" in stages or "chain_differences" in stages or "take_step_rewards" in stages else ["broadcast_steps"]
    with pytest.raises(ValueError, match=message):
        from_config([*stages, *last])


@pytest.mark.parametrize(
    "stages",
    [
        ["clause_rewards", "center", STD, "combine_advantages"],
        [{"stage": "clause_rewards"}, "combine_rewards", "center", STD],
        ["center", "weigh_by_hypervolume", "combine_advantages"],
        [WEIGH, "center", "weigh_by_hypervolume", "combine_advantages"],
        [WEIGH, {"stage": "trust_gate"}, "center", STD],
        ["combine_rewards", "center", "damp_unless_elaborate", {**STD, "over": "batch", "of": "residual"}],
        ["combine_rewards", {"stage": "f_link", "divergence": "forward_kl"}, "center", STD],
    ],
)
def test_sound_chains_are_taken(stages):
    assert len(from_config([*stages, "broadcast_steps"]).stages) == len(stages) + 1


KEPT = {
    "weights of rewards, combined": [WEIGH, "center", "combine_advantages", "renormalise"],
    "weights of rewards in one sum": [WEIGH, "combine_rewards", "center", STD],
    "factors of groups before a std of all": ["combine_rewards", "center", "damp_unless_elaborate", "renormalise"],
    "one factor after the std": ["combine_rewards", "center", STD, "weigh_by_hypervolume"],
}


@pytest.mark.parametrize("what", KEPT)
def test_a_weight_that_has_an_effect_is_taken(what):
    generator = torch.Generator().manual_seed(0)
    batch = RewardBatch(
        rewards=torch.rand(16, 2, generator=generator),
        group_id=torch.arange(16) // 4,
        sample_uid=torch.arange(16),
        metric=torch.rand(16, 1, generator=generator),
    )
    weighers = [entry for entry in KEPT[what] if entry in (WEIGH, "damp_unless_elaborate", "weigh_by_hypervolume")]
    found = []
    for stages in (KEPT[what], [entry for entry in KEPT[what] if entry not in weighers]):
        estimator = from_config([*stages, "broadcast_steps"])
        found.append(estimator.update(batch, estimator.init())[0].advantage)
    assert float((found[0] - found[1]).abs().max()) > 0.01


GOOD = {"rewards": torch.zeros(2, 1), "group_id": torch.tensor([0, 0]), "sample_uid": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": torch.zeros(2, 0)}, r"rewards: got shape \(2, 0\)"),
        ({"metric": torch.zeros(2)}, r"metric: got shape \(2,\), needed \[batch, metrics\]"),
        ({"group_id": torch.zeros(2, 1, dtype=torch.int64)}, r"group_id: got shape \(2, 1\), needed \[batch\]"),
        ({"log_prob": torch.zeros(2, 3, 1)}, r"log_prob: got shape \(2, 3, 1\), needed \[batch, steps\]"),
        ({"step_rewards": torch.zeros(2, 3)}, r"step_rewards: got shape \(2, 3\), needed .* for one reward add \[..., None\]"),
        ({"step_rewards": torch.zeros(2, 3, 2)}, "step_rewards: got 2 rewards at each step for 1 rewards"),
        ({"baseline": torch.zeros(2, 3)}, "baseline: got 3 columns for 1 rewards"),
        ({"clauses": torch.zeros(2, 3), "clauses_valid": torch.ones(2, 2, dtype=torch.bool)}, r"clauses_valid: got shape \(2, 2\)"),
        ({"rewards": torch.tensor([[1.0], [2e35]])}, r"rewards\[1, 0\]: got 2e\+35 for sample 1; rewards must be at most 1e\+30"),
        ({"metric": torch.tensor([[1.0], [-1e31]])}, r"metric\[1, 0\]: got -1e\+31"),
    ],
)
def test_tables_of_a_wrong_shape_or_size_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RewardBatch(**(GOOD | fields))


def batch_of(rewards, groups, **fields):
    return RewardBatch(
        rewards=torch.tensor(rewards)[:, None], group_id=torch.tensor(groups), sample_uid=torch.arange(len(rewards)) + 40, **fields
    )


def test_numbers_that_float32_cannot_hold_are_refused_with_the_sample():
    with pytest.raises(ValueError, match="the advantage of sample 40 is .*e.39, which float32 cannot hold"):
        recipe("dr_grpo", reward_weights=[1e10]).update(batch_of([9e29, 0.0], [0, 0]), {})


def test_a_spread_too_small_for_float64_is_no_contrast():
    found = recipe("grpo", eps=0.0).update(batch_of([1e-170, 0.0, 0.0, 0.0], [0, 0, 0, 0]), {})[0]
    assert found.advantage.flatten().tolist() == [0.0] * 4


def test_a_state_of_another_estimator_is_refused():
    batch = batch_of([0.0, 1.0], [0, 0])
    with pytest.raises(ValueError, match=r"state of stage 3 \(scale_by_beta_density.*: got nothing, needed \['mean', 'square'\]"):
        recipe("bnpo", low=0.0, high=1.0).update(batch, {})


def test_a_std_of_the_rewards_before_the_baseline_is_the_same_after_credit():
    batch = batch_of([0.0, 10.0, 100.0, 110.0], [0, 0, 1, 1])
    scale = {"stage": "scale_by_std", "over": "batch", "of": "raw", "ddof": 0, "eps": 0.0}
    found = [
        from_config(["combine_rewards", "center", *stages]).update(batch, {})[0].advantage.flatten().tolist()
        for stages in ([scale, "broadcast_steps"], ["broadcast_steps", scale])
    ]
    assert found[0] == found[1] == pytest.approx([-0.0995, 0.0995, -0.0995, 0.0995], abs=1e-4)
    late = from_config(["take_step_rewards", "combine_rewards", "center", "reward_to_go", scale])
    with pytest.raises(ValueError, match="gone once credit is given"):
        late.update(batch_of([0.0, 1.0], [0, 0], step_rewards=torch.rand(2, 3, 1)), {})


def test_large_log_ratios_of_steps_do_not_silence_a_group():
    steps = torch.tensor([[800.0, 0.0], [1.0, 2.0], [3.0, 4.0]])[..., None]
    chain = from_config(["take_step_rewards", "combine_rewards", {"stage": "link_steps", "divergence": "forward_kl"}, "center"])
    found = chain.update(batch_of([0.0, 0.0, 0.0], [0, 0, 0], step_rewards=steps), {})[0].advantage
    # Two samples of ordinary log ratios lie far from the third, and the clamp keeps that finite.
    assert torch.isfinite(found).all()
    assert found[0, 0] > 1e12
    assert found[1, 0] < 0 > found[2, 1]


def test_steps_that_are_not_trained_are_not_summed():
    batch = batch_of([1.0, 0.0], [0, 0], step_mask=torch.tensor([[True, False, True], [True, True, True]]))
    found = from_config(["combine_rewards", "center", "broadcast_steps", "reward_to_go"]).update(batch, {})[0].advantage
    assert found.tolist() == [[1.0, 0.0, 0.5], [-1.5, -1.0, -0.5]]


def test_rounding_is_no_preference():
    from flowalign.estimators.pairs import select_pairs

    ids = torch.zeros(3, dtype=torch.int64)
    pairs = select_pairs(torch.tensor([0.3, 0.1 + 0.2, 1.0], dtype=torch.float64), ids, torch.arange(3), rule="all")
    assert (pairs.winner.tolist(), pairs.loser.tolist()) == ([2, 2], [0, 1])
    best = select_pairs(torch.tensor([0.3, 0.1 + 0.2, 0.0], dtype=torch.float64), ids, torch.arange(3))
    assert (best.winner.tolist(), best.loser.tolist()) == ([0], [2])
