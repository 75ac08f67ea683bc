"""Writes the table of recipes for the documentation from the code: ``python -m flowalign.estimators.table > docs/estimators.md``."""

import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType

from flowalign.estimators import config, names
from flowalign.estimators.claims import INVARIANCES

_HEAD = """\
# Estimators

From rewards to advantages. `advantage: NAME` in a configuration, or `{type: NAME, option: value}`; `flowalign.estimators.explain(NAME)` prints
the chain of stages, and a list of stages (`[combine_rewards, center, {stage: scale_by_std, ddof: 0, eps: 1e-4}, broadcast_steps]`) makes a chain of
your own. This page is written by
`python -m flowalign.estimators.table`, from the recipes themselves.

In every recipe, statistics are float64 over the whole batch of all ranks; equal rewards are found by their range and give exactly 0 where the
comparison is within the group; a reward that is NaN was not computed and is left out.

Invariances of the advantage times the weight, with default options: **shift** (a constant added to all rewards changes nothing), **shift per group**, **scale** (a positive factor changes nothing, up to
eps), **zero mean** (in each group, at each step, each shared edge counted once), **monotone** (within a group a higher reward never gets a lower
advantage), **local** (other groups do not matter), **zero when flat** (a group of equal rewards gets exactly 0). A claim that is not made has a
counter-example in the tests. (`verpo` works from clauses, and for it "reward" means clauses passed.)

"Needs" are the tables of `RewardBatch` without which a recipe stops with a message; rewards outside its range are refused likewise. Training makes
those that the chosen estimator needs, and no others: `log_prob` of the trained steps; `baseline`, the reward of the ODE's image from the same noise;
`step_rewards`, the value of the state that each trained step starts from (`train.step_rewards`: "completion" by the ODE, or the network's "prediction");
`metric`, the columns under `metrics:` (any reward, or `novelty`, an image's mean distance to the others of its group). `tree` and `anchor_id` come from
rollouts that fork (`tempflow_grpo`, or `flow_grpo` with `depths`), and `process` from one whose every image judges one step (`tempflow_grpo`). `ssb` remembers samples, but training does not yet draw from
its memory; `gradient_weights` uses the products of advantages there, because training does not measure gradients of single rewards. Per-step tables need an algorithm that trains noisy steps (`flow_grpo`), `bpo` its `link: bounded_ratio`.

| recipe | formula | when to use | invariances | needs | source |
|---|---|---|---|---|---|
"""

_DOMAINS: Mapping[str, str] = MappingProxyType(
    {
        "binary": "rewards 0 or 1",
        "unit": "rewards in [0, 1]",
        "at_most_one": "rewards of at most 1 (`r_max`)",
        "non_negative": "rewards of at least 0",
    }
)

USES: Mapping[str, str] = MappingProxyType(
    {
        "adora": "a second quality should speak for the passes before they are reinforced",
        "bnpo": "rewards in a known range, pass rates that drift during training",
        "bpo": "objectives that regress the ratio on a bounded target instead of clipping it",
        "branch_grpo": "rollouts that branch at a few noise levels",
        "canon": "a quality that should matter only where it helps the reward",
        "dapo": "many prompts are all right or all wrong, and sampling is cheap",
        "dr_grpo": "the unbiased reference without amplification of near-flat groups",
        "drpo": "a verifiable reward and a preference: a pass is never punished for being plain",
        "epo": "groups collapse, or scatter, during training",
        "f_dpg": "to choose between seeking modes and keeping diversity",
        "flow_grpo": "the default of flow reinforcement learning; published clip ranges are for it",
        "gdpo": "several rewards of different scale; the default for more than one",
        "gigpo": "samples share states: common initial noise, prefix or branch point",
        "gpg": "unnormalised advantages while the share of flat groups changes",
        "gradient_weights": "several rewards in conflict, and their gradients can be afforded",
        "grpo": "the reference point; one reward of any scale",
        "heron": "rewards with an order of importance and no exchange rate",
        "hypervolume": "several rewards, all of which should advance the front",
        "mix_grpo": "several rewards, a moving window of stochastic steps",
        "ngrpo": "hard prompts on which every sample fails",
        "odsw": "a curriculum over prompts by their difficulty",
        "opo": "gradient norms differ between samples and are known",
        "pareto": "several rewards without weights and without order",
        "pass_at_k": "the best of several samples is what will be used",
        "process": "a judge rewards every step",
        "reinforce_pp": "one prompt, or rewards that mean the same for all prompts",
        "reinforce_pp_baseline": "a group baseline with one scale for the whole batch",
        "remax": "few samples per prompt, even one, and a deterministic sample to compare with",
        "rloo": "an unbiased baseline with small groups",
        "spo_chain": "values of intermediate states are at hand, for example from deterministic completions",
        "spo_tree": "trees, with unbiased credit for each edge",
        "ssb": "effective samples get rare and the objective needs only the images",
        "steer": "learning should cost no more diversity than it must",
        "tree_grpo": "several trees per prompt that share prefixes to save sampling",
        "tree_rl": "trees whose edges should be judged by outcome and by gain",
        "tree_rpo": "trees in which siblings are the fair comparison",
        "trust_grpo": "a learned reward beside a verifiable one, which it may try to cheat",
        "turning_point": "per-step credit without a critic; costs one completion per step",
        "tw_grpo": "steps differ in how much they decide",
        "unlikeliness": "samples of a prompt become alike although they are right",
        "verpo": "compositional prompts with checkable clauses, strict passes rare",
        "weighted_grpo": "strict 0/1 rewards: learn from rare successes and rare failures only",
    }
)
"""When to use a recipe; what the papers claim on text is not repeated here."""


def row(name: str) -> str:
    """Write one recipe's row: name, formula, use, invariances, needs and source.

    Raises:
        KeyError: If nobody has said when to use the recipe.
    """
    made = config(name)
    text = inspect.cleandoc(made.__doc__)
    formula = " ".join(text.split("\n\n")[0].split()).replace("``", "`").rstrip(".")
    claims = vars(made.claims)
    holds = ", ".join(claim.replace("_", " ") for claim in INVARIANCES if claims[claim]) or "none"
    needs = [f"`{table}`" for table in made.claims.needs]
    needs += [_DOMAINS[made.claims.domain]] if made.claims.domain in _DOMAINS else []
    cells = (f"`{name}`", formula, USES[name], holds, ", ".join(needs) or "rewards", _source(text))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _source(text: str) -> str:
    references = " ".join(text.partition("References:")[2].partition("Attributes:")[0].split())
    found = re.findall(r'"([^"]+)",(?: \w+)? (\d{4})(?:,? (https://[^\s,;]+[^\s,;.:]))?', references)
    return "; ".join(f"[{title}, {year}]({link})" if link else f"{title}, {year}" for title, year, link in found)


def page() -> str:
    """Write the whole page."""
    return _HEAD + "\n".join(row(name) for name in names()) + "\n"


if __name__ == "__main__":
    print(page(), end="")
