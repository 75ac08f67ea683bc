"""Rewards that need no model: JPEG size, and functions of the user's own."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign import config, plugins
from flowalign.rewards import jpeg_size
from flowalign.rewards.plain import PlainReward
from flowalign.run_config import RewardConfig
from flowalign.train.scoring import NamedReward, score
from tests.rewards import tiny

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def length(prompts, images, bonus=None):
    """The length of the prompt."""
    return [len(prompt) + (bonus[row] if bonus else 0) for row, prompt in enumerate(prompts)]


def everything(prompts, images, **columns):
    return images.mean((1, 2, 3)) + len(columns)


def test_jpeg_sizes_are_those_of_the_format():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    gradient = np.broadcast_to(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], (512, 512, 3))
    grey = np.full((512, 512, 3), 128, np.uint8)
    sizes = [jpeg_size.num_bytes(Image.fromarray(np.ascontiguousarray(array)), 95) for array in (grey, gradient, noise)]
    assert sizes[0] == pytest.approx(4721, rel=0.02)
    assert sizes[1] == pytest.approx(15593, rel=0.02)
    assert sizes[2] == pytest.approx(307993, rel=0.02)


def test_both_signs_and_the_unit():
    images = tiny.pictures(2, 64, 64)
    small = jpeg_size.Config().build()(images, ["a", "b"], [{}] * 2)
    large = jpeg_size.Config(want="large", unit=500).build()(images, ["a", "b"], [{}] * 2)
    assert torch.equal(small, -500 * large)
    assert bool((small < 0).all())
    with pytest.raises(ValueError, match="unit: got 0"):
        jpeg_size.Config(unit=0)


def test_a_function_gets_the_columns_it_asks_for():
    records = [{"prompt": "x", "bonus": 1}, {"prompt": "x", "bonus": 2}, {"prompt": "x", "bonus": 3}]
    assert PlainReward(length)(IMAGES, ["a", "bb", "ccc"], records).tolist() == [2, 4, 6]
    assert PlainReward(length)(IMAGES, ["a", "bb", "ccc"], [{}] * 3).tolist() == [1, 2, 3]
    torch.testing.assert_close(PlainReward(everything)(IMAGES, ["a"] * 3, records), IMAGES.mean((1, 2, 3)) + 2)
    assert PlainReward(lambda images, metadata: [record["bonus"] for record in metadata])(IMAGES, ["a"] * 3, records).tolist() == [1, 2, 3]


def test_a_function_that_asks_for_what_is_not_there_is_told_what_is():
    with pytest.raises(ValueError, match=r"asks for 'colour', but the prompts' records have prompt, tag"):
        PlainReward(lambda prompts, colour: [0])(IMAGES, ["a"] * 3, [{"prompt": "a", "tag": "t"}] * 3)
    with pytest.raises(ValueError, match="returned 5"):
        PlainReward(lambda prompts, images: 5)(IMAGES, ["a"] * 3, [{}] * 3)


def test_arguments_come_by_name_or_the_function_is_refused():
    def some(prompts, images, *rest):
        return [float(len(rest))] * len(prompts)

    def optional(seed=3, /, *, prompts):
        return [seed] * len(prompts)

    assert PlainReward(some)(IMAGES, ["a"] * 3, [{}] * 3).tolist() == [0, 0, 0]
    assert PlainReward(optional)(IMAGES, ["a"] * 3, [{}] * 3).tolist() == [3, 3, 3]
    for function, named in (
        (lambda prompts, images, /: [0], "prompts, images"),
        (lambda prompts, /, images: [0], "prompts"),
        (lambda prompts, /, **columns: [0], "prompts"),
        (lambda *rest: [0], r"\*rest"),
    ):
        with pytest.raises(ValueError, match=f"reward function .*: takes {named} by position only, but arguments are given by name"):
            PlainReward(function)(IMAGES, ["a"] * 3, [{}] * 3)


def test_a_dotted_type_may_be_a_function_and_comes_back_as_it_was_written():
    entry = config.decode(RewardConfig, {"reward": "tests.rewards.test_plain.length", "weight": 2.0})
    assert config.encode(entry)["reward"] == {"type": "tests.rewards.test_plain.length"}
    assert entry.reward.build()(IMAGES, ["a", "bb", "ccc"], [{}] * 3).tolist() == [1, 2, 3]
    with pytest.raises(config.ConfigError, match=r"has no function 'lenght': did you mean tests.rewards.test_plain.length"):
        config.decode(RewardConfig, {"reward": "tests.rewards.test_plain.lenght"})
    with pytest.raises(ValueError, match="no module"):
        plugins.load("algorithms", "tests.rewards.test_plain.length")


def test_python_takes_the_function_itself():
    entry = RewardConfig(reward=length)
    assert config.encode(entry)["reward"] == {"type": "tests.rewards.test_plain.length"}
    assert entry.reward.build()(IMAGES, ["a", "bb", "ccc"], [{}] * 3).tolist() == [1, 2, 3]


def test_none_is_not_computed_and_must_be_allowed():
    reward = PlainReward(lambda prompts, images: [1.0, None, 2.0])
    with pytest.raises(ValueError, match="returned nan for sample 1 .*may_skip"):
        score([NamedReward(name="mine", reward=reward)], IMAGES, ["a"] * 3, [{}] * 3)
    table = score([NamedReward(name="mine", reward=reward, may_skip=True)], IMAGES, ["a"] * 3, [{}] * 3)
    assert table.means() == {"mine": 1.5}


def test_several_rewards_are_kept_raw_side_by_side():
    rewards = [NamedReward(name="length", reward=PlainReward(length)), NamedReward(name="size", reward=jpeg_size.Config().build())]
    table = score(rewards, IMAGES, ["a", "bb", "ccc"], [{}] * 3)
    assert table.names == ("length", "size")
    assert table.values[:, 0].tolist() == [1, 2, 3]
    assert bool((table.values[:, 1] < -0.1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_are_rounded_to_bytes_as_one_formula_says_whatever_their_layout(dtype):
    from flowalign.rewards.pixels import to_bytes

    images = (torch.rand(3, 3, 130, 90, generator=torch.Generator().manual_seed(0)) * 1.002 - 0.001).to(dtype)
    images[0, 0, 0, :4] = torch.tensor([0.5 / 255, 1.5 / 255, 1.0, 0.0])  # halves go to the even byte
    for seen in (images, images.permute(0, 1, 3, 2), images[:, :, ::2], images[:0], images.clone().requires_grad_()):
        assert torch.equal(to_bytes(seen), (seen.detach().float().clamp(0, 1) * 255).round().to(torch.uint8))


def test_what_a_check_lets_pass_needs_no_clamp_before_it_is_rounded():
    from flowalign.rewards.pixels import check, to_bytes, to_bytes_checked

    images = torch.linspace(-0.0009, 1.0009, 3 * 40 * 40).view(1, 3, 40, 40)
    check(images, ["a"], "here")
    assert torch.equal(to_bytes_checked(images), to_bytes(images))


class Scaled:
    """A reward with settings of its own."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, prompts, images):
        return self.factor * images.mean((1, 2, 3))

    def shifted(self, images):
        return images.mean((1, 2, 3)) + self.factor


@pytest.mark.parametrize("reward", [Scaled(2.0), Scaled(2.0).shifted, partial(length, bonus=[1, 1, 1])])
def test_anything_callable_is_a_reward(reward):
    built = RewardConfig(reward=reward).reward.build()
    found = built(IMAGES, ["a", "b", "c"], [{}] * 3)
    expected = reward(
        **{name: {"prompts": ["a", "b", "c"], "images": IMAGES}[name] for name in inspect.signature(reward).parameters if name != "bonus"}
    )
    assert torch.as_tensor(found, dtype=torch.float64).tolist() == pytest.approx(torch.as_tensor(expected, dtype=torch.float64).tolist())
