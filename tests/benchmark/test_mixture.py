"""What the two-dimensional study measures, on samples whose quality is known."""

import math
import sys
from pathlib import Path

import pytest
import torch

from flowalign.core.randomness import generator
from flowalign.core.worlds import MixtureWorld

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import distill_2d
from mixture_students import RADIUS, SHARES, STD, Settings, Study, measure


@pytest.fixture(scope="module")
def world():
    angles = 2 * torch.pi * torch.arange(len(SHARES)) / len(SHARES)
    return MixtureWorld(RADIUS * torch.stack([angles.cos(), angles.sin()], 1), STD, SHARES)


def drawn(world, purpose, num=1000):
    return world.sample(num, generator(0, purpose))


def test_samples_of_the_mixture_itself_have_everything(world):
    found = measure(drawn(world, "one"), world, drawn(world, "two"))
    assert found["modes"] == 8
    assert found["precision"] > 0.95
    assert found["recall"] > 0.95
    assert found["kl"] < 0.02
    assert found["tv"] < 0.05
    assert abs(found["energy"]) < 0.02
    # A Rayleigh variable below three; four standard errors of a thousand samples.
    assert found["near"] == pytest.approx(1 - math.exp(-4.5), abs=0.0135)
    assert sum(found["histogram"]) == pytest.approx(1)


def test_one_mode_alone_is_precise_and_covers_nothing(world):
    made = world.means[0] + STD * torch.randn(1000, 2, generator=generator(0, "made"))
    found = measure(made, world, drawn(world, "two"))
    assert found["modes"] == 1
    assert found["precision"] > 0.95
    # Of the real samples those of this mode alone, whose share is .3.
    assert 0.2 < found["recall"] < 0.4
    assert found["tv"] == pytest.approx(0.7, abs=1e-6)
    # Half a sample more for each mode; all others have nothing else.
    first, *others = (share / sum(SHARES.tolist()) for share in SHARES.tolist())
    expected = first * math.log(first * 1004 / 1000.5) + sum(share * math.log(share * 1004 / 0.5) for share in others)
    assert found["kl"] == pytest.approx(expected, rel=1e-5)
    assert found["energy"] > 1


def test_samples_far_away_are_neither_near_nor_precise(world):
    found = measure(drawn(world, "one") + 20, world, drawn(world, "two"))
    assert (found["near"], found["precision"], found["recall"]) == (0, 0, 0)


def test_students_of_a_seed_see_the_same_draws_and_differ_by_their_divergence():
    settings = Settings(iterations=4, evaluate_at=(4,), warmup=2, batch=16, num_samples=64)
    names = ("reverse_kl", "forward_kl")
    study = Study(names, 3, settings)
    found = study.run()
    again = Study(names, 3, settings).run()
    assert found == again
    assert found["reverse_kl"]["4"]["effective_share"] == pytest.approx(1)
    one, two = (study.samples(torch.randn(8, 2, generator=generator(0, "z")))[place] for place in (0, 1))
    assert not torch.equal(one, two)


def test_a_verdict_of_means_says_whether_its_interval_holds_zero():
    def result(values):
        return {name: {str(at): {"kl": kl, "recall": 0.9} for at in (300, 1200)} for name, kl in values.items()}

    close = {
        seed: result({"jensen_shannon": 0.02, "reverse_kl": 0.01 + 0.1 * (seed == 2), "softened_reverse_kl": 0.5, "forward_kl": 0.02})
        for seed in range(3)
    }
    far = {
        seed: result({"jensen_shannon": 0.02, "reverse_kl": 0.5 + 0.01 * seed, "softened_reverse_kl": 0.9, "forward_kl": 0.02})
        for seed in range(3)
    }
    settings = Settings(iterations=1200)
    first, clear = (distill_2d.expectations(results, settings)[0] for results in (close, far))
    assert first["holds"]
    assert first["beyond 0"] is False
    assert clear["holds"]
    assert clear["beyond 0"] is True
