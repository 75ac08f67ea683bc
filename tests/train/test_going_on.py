"""Going on from another run's last checkpoint with other settings."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from flowalign.cli import main
from flowalign.config import ConfigError
from flowalign.going_on import take_over
from flowalign.run import build_trainer, run_training
from flowalign.run_config import load_config
from flowalign.train.journal import read_log

SMALL = {"groups": 2, "group_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 1}
WEIGHTS = "weights/pytorch_lora_weights.safetensors"


@pytest.fixture
def begun(write_config):
    """A finished run of two steps."""
    config = load_config(str(write_config("begun", steps=2, train=SMALL)))
    run_training(config)
    return config.output


def test_with_the_same_settings_it_is_the_run_that_was_not_stopped(write_config, begun, capsys):
    whole = load_config(str(write_config("whole", steps=3, train=SMALL)))
    run_training(whole)
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    path = write_config("after", steps=3, train=SMALL)
    main(["train", str(path), "--from", str(begun)])
    after = load_config(str(path))
    assert f"going on from step 2 of {begun}" in capsys.readouterr().out
    one, two = (load_file(config.output / WEIGHTS) for config in (whole, after))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [line["reward"] for line in read_log(after.output / "log.jsonl")] == [
        line["reward"] for line in read_log(whole.output / "log.jsonl")
    ]
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_rates_and_betas_are_those_of_the_new_configuration(write_config, begun):
    path = write_config("after", steps=3, train={**SMALL, "learning_rate": 1e-4, "betas": [0.5, 0.6], "weight_decay": 0.25})
    config = load_config(str(path))
    assert take_over(begun, config) == 2
    trainer = build_trainer(config, Accelerator())
    trainer.fit(3)
    group = trainer.cast.optimizer.param_groups[0]
    assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (1e-4, [0.5, 0.6], 0.25)
    moments = next(iter(trainer.cast.optimizer.state_dict()["state"].values()))
    assert moments["step"] == 6  # two updates a step: the moments are of all three
    # A run that is there is resumed as it is.
    main(["train", str(path), "--from", str(begun)])
    assert take_over(begun, config) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "steps: got 2, but .* has done 2 already"),
        ({"algorithm": {"type": "flow_grpo"}}, "of something else .changed: algorithm.type: "),
        ({"advantage": "dr_grpo"}, "of something else .changed: advantage: "),
    ],
)
def test_what_a_checkpoint_does_not_hold_is_refused(write_config, begun, changes, message):
    config = load_config(str(write_config("after", **{"steps": 3, "train": SMALL, **changes})))
    with pytest.raises(ConfigError, match=message):
        take_over(begun, config)
    assert not config.output.exists()


def test_other_adapters_and_folders_that_are_no_run_are_refused(write_config, begun, tmp_path):
    path = write_config("after", steps=3, train=SMALL)
    with pytest.raises(ConfigError, match="something else .changed: pipeline.lora"):
        take_over(begun, load_config(str(path), ["--pipeline.lora.rank", "2"]))
    with pytest.raises(ConfigError, match="not a run folder"):
        take_over(tmp_path, load_config(str(path)))
    for checkpoint in (begun / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(ConfigError, match="has no checkpoint"):
        take_over(begun, load_config(str(path)))


def test_a_teachers_samples_are_taken_along_where_they_would_be_the_same(write_config):
    algorithm = {"type": "dmd2", "num_pairs": 12, "critic_updates": 2, "least_steps": 1, "adversarial_weight": 0.1}
    algorithm |= {"discriminator": {"taps": [0.5], "width": 8}}
    small = {"groups": 2, "group_size": 2, "micro_batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 1}
    begun = load_config(str(write_config("begun", steps=2, train=small, rewards=[], algorithm=algorithm)))
    run_training(begun)
    for name, changes, taken in (
        ("slower", {"train": {**small, "learning_rate": 1e-3}}, True),
        ("guided", {"algorithm": {**algorithm, "guidance_scale": 2.0}}, False),
        ("another seed", {"seed": 1}, False),
    ):
        config = load_config(str(write_config(name, **{"steps": 3, "train": small, "rewards": [], "algorithm": algorithm, **changes})))
        assert take_over(begun.output, config) == 2
        assert (config.output / "pairs").is_dir() == taken, name


def test_a_checkpoint_of_another_head_is_told_with_its_place(write_config):
    algorithm = {"type": "dmd2", "num_pairs": 12, "critic_updates": 2, "least_steps": 1, "adversarial_weight": 0.1}
    small = {"groups": 2, "group_size": 2, "micro_batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 1}
    narrow, wide = ({**algorithm, "discriminator": {"taps": [0.5], "width": width}} for width in (8, 16))
    begun = load_config(str(write_config("begun", steps=2, train=small, rewards=[], algorithm=narrow)))
    run_training(begun)
    config = load_config(str(write_config("wide", steps=3, train=small, rewards=[], algorithm=wide)))
    with pytest.raises(ValueError, match="checkpoints: does not fit this configuration"):
        run_training(config, source=begun.output)
