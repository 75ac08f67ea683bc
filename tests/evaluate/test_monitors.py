"""Monitors of reward hacking: their values, and when they raise an alarm."""

import pytest
import torch

from flowalign.core.randomness import generator
from flowalign.evaluate import monitors
from flowalign.evaluate.fidelity import pixel_statistics

IMAGES = torch.rand(8, 3, 16, 16, generator=generator(0))
GROUP = torch.arange(8) // 4


def test_pixel_monitors_are_the_reports_statistics():
    found, wanted = monitors.summarise(monitors.features(IMAGES), GROUP), pixel_statistics(IMAGES)
    for name in ("brightness", "saturation", "edge_density"):
        assert found[name] == pytest.approx(vars(wanted)[name], abs=1e-7)


def test_high_frequency_energy_is_all_of_a_chequerboard_and_little_of_a_ramp():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    board = ((rows + columns) % 2).float().expand(1, 3, 32, 32)
    ramp = (columns / 31.0).expand(1, 3, 32, 32)
    high, low = (float(monitors.features(image)[0, 3]) for image in (board, ramp))
    assert high > 0.75
    assert low < 0.01
    assert float(monitors.features(torch.zeros(1, 3, 8, 8))[0, 3]) == 0


def test_diversity_is_within_prompts():
    same = IMAGES[:1].expand(4, -1, -1, -1)
    assert monitors.summarise(monitors.features(torch.cat([same, IMAGES[1:2].expand(4, -1, -1, -1)])), GROUP)["diversity"] == 0
    assert monitors.summarise(monitors.features(IMAGES), GROUP)["diversity"] > 0.05


def test_large_images_are_averaged_down_first():
    large = torch.nn.functional.interpolate(IMAGES[:2], 512)
    assert monitors.features(large)[:, 0].tolist() == pytest.approx(monitors.features(IMAGES[:2])[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_the_finest_texture_is_seen_at_any_size(size):
    """What a reward for heavy files makes: averaged down to 256 pixels it would be plain grey."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    board = ((rows + columns) % 2).float().expand(1, 3, size, size)
    found = monitors.features(board)[0]
    assert float(found[3]) > 0.75
    assert float(found[2]) > 0.9


def log(steps=20, **series):
    """Lines of a log; a value is a function of the step."""
    base = {"brightness": lambda i: 0.5, "saturation": lambda i: 0.5, "edge_density": lambda i: 0.2, "high_frequency": lambda i: 0.1}
    made = {
        **base,
        "diversity": lambda i: 0.2,
        "trained": lambda i: 0.3 + 0.001 * (i % 2),
        "held": lambda i: 0.6 + 0.001 * (i % 2),
        "latent_rms": lambda i: 1.0,
        "velocity_rms": lambda i: 1.5,
        **series,
    }
    return [
        {
            "step": i,
            "monitor": {name: made[name](i) for name in (*base, "diversity", *monitors.NORMS)},
            "reward": {"trained": made["trained"](i)},
            "metric": {"held": made["held"](i)},
        }
        for i in range(steps)
    ]


def raised(lines):
    return [alarm.monitor for alarm in monitors.alarms(lines, ["trained"], ["held"])]


def test_a_steady_run_raises_nothing():
    assert raised(log()) == []
    assert raised(log(trained=lambda i: 0.3 + 0.02 * i, held=lambda i: 0.6 + 0.01 * i)) == []
    assert raised(log(trained=lambda i: 0.3 + 0.02 * i)) == []


@pytest.mark.parametrize(
    ("series", "monitor"),
    [
        ({"diversity": lambda i: 0.2 / (1 + i)}, "diversity"),
        ({"brightness": lambda i: 0.5 + 0.02 * i}, "brightness"),
        ({"saturation": lambda i: 0.5 - 0.02 * i}, "saturation"),
        ({"high_frequency": lambda i: 0.1 + 0.02 * i}, "high_frequency"),
        ({"trained": lambda i: 0.3 + 0.02 * i, "held": lambda i: 0.6 - 0.01 * i}, "held-out held"),
    ],
)
def test_each_sign_raises_its_own_alarm(series, monitor):
    assert raised(log(**series)) == [monitor]
    assert raised(log(steps=9, **series)) == []


def test_a_held_out_reward_that_falls_with_the_trained_one_is_no_hacking():
    assert raised(log(trained=lambda i: 0.3 - 0.01 * i, held=lambda i: 0.6 - 0.01 * i)) == []


def test_one_trained_reward_of_several_that_rises_while_a_held_out_one_falls_is_enough():
    lines = log(trained=lambda i: 0.3 + 0.02 * i, held=lambda i: 0.6 - 0.01 * i)
    both = [{**line, "reward": {**line["reward"], "other": 0.5 - 0.01 * i}} for i, line in enumerate(lines)]
    (alarm,) = monitors.alarms(both, ["other", "trained"], ["held"])
    assert alarm.text.endswith("while trained rises")


def test_noise_like_that_of_the_first_steps_raises_nothing():
    assert raised(log(brightness=lambda i: 0.5 + 0.3 * (-1) ** i)) == []


@pytest.mark.parametrize(("last", "raised"), [(1.2, False), (1.3, True), (0.7, True)])
@pytest.mark.parametrize("name", monitors.NORMS)
def test_a_norm_that_grows_or_shrinks_by_more_than_a_quarter_raises_an_alarm(name, last, raised):
    found = monitors.alarms(log(**{name: lambda i: 1.0 if i < 10 else last}), ["trained"], ["held"])
    assert [alarm.monitor for alarm in found] == ([name] if raised else [])
    wild = log(**{name: lambda i: (1.0 + 0.3 * (-1) ** i) if i < 10 else 1.3})
    assert not monitors.alarms(wild, ["trained"], ["held"])


def test_the_gap_is_what_the_trained_reward_rose_more_than_the_held_out_one():
    lines = log(trained=lambda i: 0.3 + 0.01 * (i % 2) + 0.1 * (i >= 10), held=lambda i: 0.6 + 0.02 * (i % 2) - 0.1 * (i >= 10))
    spread = (0.24) ** 0.5  # of 0, 1, 0, 1, 0
    middle = 0.2  # the last five begin with 1
    expected = (0.1 + 0.01 * middle) / (0.01 * spread) - (-0.1 + 0.02 * middle) / (0.02 * spread)
    assert monitors.gaps(lines, ["trained"], ["held"]) == {"gap/held": pytest.approx(expected)}
    alike = log(trained=lambda i: 0.01 * (i % 2) + 0.1 * i, held=lambda i: 0.02 * (i % 2) + 0.2 * i)
    assert monitors.gaps(alike, ["trained"], ["held"])["gap/held"] == pytest.approx(0, abs=1e-9)
    assert monitors.gaps(lines[:9], ["trained"], ["held"]) == {}
    assert monitors.gaps(log(trained=lambda i: 0.0), ["trained"], ["held"]) == {}


def student(values, name="diversity"):
    part = "monitor" if name == "diversity" else "reward"
    return [{"step": step, part: {name: value}} for step, value in enumerate(values)]


def test_a_student_is_measured_by_the_best_that_it_had_and_not_by_its_blurred_beginning():
    rise = [0.0006] * 5 + [0.1] * 10
    assert monitors.student_alarms(student(rise), []) == []
    (alarm,) = monitors.student_alarms(student([*rise, *[0.04] * 5]), [])
    assert (alarm.monitor, alarm.step) == ("diversity", 19)
    assert "diversity falls: 0.1000 -> 0.0400" in alarm.text
    assert monitors.student_alarms(student([*rise, *[0.06] * 5]), []) == []
    (alarm,) = monitors.student_alarms(student([0.0, 0.2, 0.3, 0.3, 0.3, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0], "strict"), ["strict"])
    assert alarm.monitor == "strict"
    assert monitors.student_alarms(student([0.3] * 9), []) == []


def test_a_score_of_any_offset_or_sign_is_judged_by_what_it_gained_and_by_its_scatter():
    def alarms(values):
        return monitors.student_alarms(student(values, "score"), ["score"])

    rising = [-1.5 + 0.05 * step for step in range(15)]
    for offset in (0.0, 20.0):
        assert alarms([value + offset for value in rising]) == []
        fallen = [*rising, -0.8, -0.9, -1.1, -1.2, -1.3, -1.4, -1.4]
        assert [alarm.monitor for alarm in alarms([value + offset for value in fallen])] == ["score"]
    assert alarms([0.2, 0.22] * 5 + [0.2, 0.19, 0.2, 0.19, 0.2]) == []  # no more than it scatters
