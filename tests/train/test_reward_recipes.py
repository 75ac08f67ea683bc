"""The shipped recipes of reinforcement learning on tiny random models of the same families: they take three steps, and are what was published."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from flowalign.run import build_trainer
from flowalign.run_config import CONFIGS, RewardConfig, load_config
from tests.pipelines import families
from tests.train import brightness

FAMILIES = {"sd35m": "sd3", "flux": "flux dev", "sd15": "sd 1.5", "sdxl": "sdxl guided"}
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem.split("_")[-1] in ("geneval", "ocr", "pickscore", "aesthetic"))
SMALL = {
    "train.groups": 2,
    "train.group_size": 2,
    "train.rollout_batch_size": 4,
    "train.sample_every": 0,
    "pipeline.num_steps": 5,
    "pipeline.dtype": "float32",
    "pipeline.height": 16,
    "pipeline.width": 16,
}
# Groups, images of a group, steps, guidance, rate, and what the algorithm adds (specification of reinforcement learning, section 2).
PUBLISHED = {
    "sd35m_awm_geneval": (
        72,
        24,
        14,
        1.0,
        3e-4,
        {"reference_penalty": 0.001, "slow_penalty": 1.0, "num_levels": 6, "weighting": "ghuber", "levels": "discrete"},
    ),
    "sd35m_awm_ocr": (72, 24, 14, 1.0, 3e-4, {"reference_penalty": 0.003, "slow_rate": 0.001, "slow_max": 0.3, "levels": "discrete"}),
    "sd35m_awm_pickscore": (
        24,
        24,
        14,
        1.0,
        3e-4,
        {"reference_penalty": 1e-4, "advantage_clip": 5.0, "advantage_max": 1.0, "levels": "discrete_from_noise"},
    ),
    "sd35m_tempflow_geneval": (48, 4, 10, 4.5, 3e-4, {"num_children": 6, "kl_penalty": 0.004, "clip": 1e-4, "noise_level": 0.7}),
    "sd35m_tempflow_ocr": (48, 4, 10, 4.5, 3e-4, {"kl_penalty": 0.004, "kl_unit": "gaussian", "compare": "state"}),
    "sd35m_tempflow_pickscore": (48, 4, 10, 4.5, 3e-4, {"kl_penalty": 0.001, "num_minibatches": 2, "step_weight": "noise"}),
    "sd35m_nft_geneval": (48, 24, 10, 1.0, 3e-4, {"beta": 1.0, "reference_penalty": 1e-4, "old_rate": 0.001, "old_max": 0.5}),
    "sd35m_nft_ocr": (48, 24, 10, 1.0, 3e-4, {"beta": 0.1, "old_rate": 0.0075, "old_max": 0.999, "old_start": 75, "num_minibatches": 2}),
    "sd35m_nft_pickscore": (48, 24, 10, 1.0, 3e-4, {"beta": 1.0, "num_levels": None, "num_minibatches": 1}),
    "flux_flow_grpo_pickscore": (48, 24, 6, 3.5, 3e-4, {"noise_level": 0.9, "clip": 1e-4, "kl_penalty": 0.0, "num_minibatches": 2}),
    "flux_awm_pickscore": (48, 16, 10, 3.5, 3e-4, {"num_levels": 4, "level_fraction": 0.7, "slow_penalty": 0.1, "advantage_clip": 1.0}),
    "sd15_ddpo_aesthetic": (32, 8, 50, 5.0, 3e-4, {"clip": 1e-4, "num_minibatches": 2, "kl_penalty": 0.0}),
    "sd15_ddpo_pickscore": (32, 8, 50, 5.0, 3e-4, {"clip": 1e-4, "num_minibatches": 4, "kernel": "ddim"}),
    "sdxl_awm_aesthetic": (8, 8, 20, 5.0, 1e-4, {"weighting": "ghuber"}),
    "sdxl_awm_pickscore": (8, 8, 20, 5.0, 1e-4, {"weighting": "ghuber"}),
}


def small(name, folder):
    """A recipe, its sizes cut down, its models replaced by tiny ones and its rewards by one that has no weights."""
    path = folder / "prompts.txt"
    path.write_text('a sign "red"\na disk\na ring\ntwo rings\n')
    flags = {**SMALL, "prompts.source": path, "output": folder / "run"}
    whole = load_config(name)
    if name.startswith(("sd35m", "flux")):
        flags["pipeline.max_sequence_length"] = 12
    flags["train.groups"] = max(2, whole.algorithm.num_minibatches)
    if "awm" in name:
        del flags["pipeline.num_steps"]  # its levels are those of the schedule
    if "tempflow" in name:
        flags["algorithm.num_children"] = 2
    config = load_config(name, [part for key, value in flags.items() for part in (f"--{key}", str(value))])
    assert [entry.weight for entry in config.rewards] == [entry.weight for entry in whole.rewards]
    return replace(config, rewards=(RewardConfig(reward=brightness.Config()),))


def test_every_recipe_is_known_and_says_that_it_was_not_run():
    assert sorted(PUBLISHED) == RECIPES
    for name in RECIPES:
        text = (CONFIGS / f"{name}.yaml").read_text()
        assert "Not run on real weights yet" in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_no_configuration_is_longer_than_40_lines(path):
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_rates_are_the_published_ones(name):
    config = load_config(name)
    groups, group_size, num_steps, guidance, rate, more = PUBLISHED[name]
    assert (config.train.groups, config.train.group_size, config.train.learning_rate) == (groups, group_size, rate)
    assert (config.pipeline.num_steps, config.pipeline.guidance_scale) == (num_steps, guidance)
    assert {key: vars(config.algorithm)[key] for key in more} == more
    assert config.train.weight_decay == 1e-4
    trained = [entry for entry in config.rewards if entry.weight > 0]
    assert [type(entry.reward).__module__.split(".")[-1] for entry in trained] == [name.split("_")[-1]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_takes_three_steps(name, tmp_path):
    config, case = small(name, tmp_path), FAMILIES[name.split("_")[0]]
    pipe = config.pipeline.thrifty(families.pipeline(case))
    flow = families.build(
        case, pipe=pipe, lora=config.pipeline.lora, num_steps=config.pipeline.num_steps, guidance_scale=config.pipeline.guidance_scale
    )
    built = build_trainer(config, Accelerator(), pipeline=flow)
    before = [value.detach().clone() for value in flow.roles.trainable_parameters()]
    lines = [built.step(step) for step in range(3)]
    assert all(math.isfinite(value) for line in lines for value in line["metrics"].values())
    assert all(line["grad_norm"] > 0 for line in lines)
    assert any(not torch.equal(a, b) for a, b in zip(flow.roles.trainable_parameters(), before, strict=True))
    assert lines[0]["evaluations"]["rows_per_evaluation"] == (2 if config.pipeline.guidance_scale > 1 and case != "flux dev" else 1)
