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
    ],
)
def test_options_that_do_not_fit_are_refused_when_the_recipe_is_built(name, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(name, **options)


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


STD = {"stage": "scale_by_std", "ddof": 1, "eps": 1e-4}
WEIGH = {"stage": "weigh_rewards", "weights": [1.0, 7.0]}
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
    "factors of groups before signs": ["combine_rewards", "center", "damp_unless_elaborate", "sign"],
}


@pytest.mark.parametrize("what", NO_OPS)
def test_a_weight_that_would_be_undone_is_refused(what):
    with pytest.raises(ValueError, match="standard deviations, ranks and signs undo weights given before them"):
        from_config([*NO_OPS[what], "broadcast_steps"])


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
