"""The report of run folders."""

import json
import re

import pytest
import torch
import yaml

from flowalign import images
from flowalign.cli import main
from flowalign.compute import flops_by_purpose
from flowalign.config import ConfigError
from flowalign.env import MADE, note_made, read_made, versions
from flowalign.run_report import _mean, report_runs


def make_run(folder, *, rate=1e-4, alarm=True, steps=12):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "train": {"learning_rate": rate}}))
    lines = []
    for step in range(steps):
        line = {"step": step, "reward": {"jpeg<size>": 0.1 * step}, "metric": {"shapes": 0.5}, "monitor": {"diversity": 1 / (1 + step)}}
        line |= {"grad_norm": 1.0, "metrics": {"loss": 0.1}, "time_s": {"rollout": 1.0, "train": 2.0, "total": 3.0}}
        lines.append(line | ({"alarm": [f"images grow alike: 0.2 -> {step}"]} if alarm and step > 9 else {}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_run_shows_curves_monitors_alarms_and_where_the_time_went(tmp_path):
    text = report_runs([make_run(tmp_path / "a")]).read_text()
    for wanted in (
        "Reward: jpeg&lt;size&gt;",
        "Monitor: diversity",
        "Held out: shapes",
        "images grow alike: 0.2 -&gt; 10",
        "rollout",
        "Alarms in: a.",
    ):
        assert wanted in text
    assert text.count("images grow alike") == 1  # where it was first raised
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert len(text) < 1_000_000


def test_several_runs_share_charts_and_show_their_differences(tmp_path, capsys):
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", rate=3e-4, alarm=False)
    main(["report", str(one), str(two), "--output", str(tmp_path / "both.html")])
    assert "both.html" in capsys.readouterr().out
    text = (tmp_path / "both.html").read_text()
    assert "train.learning_rate: 0.0001 -&gt; 0.0003" in text
    assert "Alarms in: a." in text


def with_costs(folder, *, rollout):
    lines = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"images": 16, "flops_per_row": 1e6}
        line["evaluations"] = {"rollout": rollout, "train": 100, "reference": 100, "total": rollout + 200, "rows_per_evaluation": 2}
        line["time_s"] |= {"reward": 0.25, "reward_hidden": 0.75}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_what_a_run_cost_stands_in_its_report(tmp_path):
    run = with_costs(make_run(tmp_path / "a"), rollout=600)
    log = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    # Rows of 12 steps, two of an evaluation; training's have a backward, which costs two forwards more.
    assert flops_by_purpose(log) == {"rollout": 12 * 1200e6, "training, with backward": 12 * 600e6, "base, for penalties": 12 * 200e6}
    text = report_runs([run]).read_text()
    for wanted in (
        "Where the floating-point operations went",
        "2.4e+10",
        "60.0 %",
        "30.0 %",
        "10.0 %",
        "9.0 s, 75 % of it",
        "What it cost",
        "9,600",
    ):
        assert wanted in text
    both = report_runs([run, with_costs(make_run(tmp_path / "b"), rollout=1600)], tmp_path / "both.html").read_text()
    assert "80.0 %" in both
    assert "60.0 %" in both
    assert flops_by_purpose([{"evaluations": {"rollout": 3, "total": 3, "rows_per_evaluation": 1}}]) == {}


def test_grids_over_time_are_spread_over_the_run_and_end_with_its_last(tmp_path):
    run = make_run(tmp_path / "a")
    for name in ("base", *(f"step_{step:06d}" for step in range(20, 161, 20))):
        images.save_png(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)), run / "samples" / f"{name}.png")
    images.save_png(torch.rand(3, 900, 900, generator=torch.Generator().manual_seed(0)), run / "samples" / "step_000160.png")
    text = report_runs([run]).read_text()
    shown = re.findall(r'alt="(the base|after \d+ steps)"', text)
    assert shown == ["the base", "after 40 steps", "after 60 steps", "after 100 steps", "after 120 steps", "after 160 steps"]
    assert text.count("data:image/jpeg") == 1  # what is large is made smaller
    assert "Over time" in text
    assert "Over time" not in report_runs([make_run(tmp_path / "b")]).read_text()


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no run"):
        report_runs([tmp_path])
    make_run(tmp_path / "a", steps=0)
    with pytest.raises(ConfigError, match="has finished no step"):
        report_runs([tmp_path / "a"])


def made(command, devices):
    return json.dumps({"command": command, "versions": {"torch": "9.8.7"}, "hardware": {"devices": devices}}) + "\n"


def test_a_report_says_how_the_run_was_made_and_not_how_the_report_was(tmp_path):
    run = make_run(tmp_path / "a")
    assert "no record of command, software and machine" in report_runs([run]).read_text()
    (run / MADE).write_text(
        made("flowalign train mine --seed 7", "Abacus") + made("flowalign train mine --seed 7 --steps 9", "Slide rule") + '{"cut'
    )
    text = report_runs([run]).read_text()
    assert "flowalign train mine --seed 7 --steps 9" in text
    assert "9.8.7" in text
    assert all(device in text for device in ("Abacus", "Slide rule"))  # it was begun twice
    assert "no record" not in text
    other = make_run(tmp_path / "b")
    (other / MADE).write_text(made("flowalign train other", "Quipu"))
    both = report_runs([run, other], tmp_path / "both.html").read_text()
    assert all(told in both for told in ("How runs were made", "Abacus", "Quipu", "flowalign train other"))


def test_a_training_run_notes_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["flowalign", "train", "a b"])
    note_made(tmp_path)
    note_made(tmp_path)
    first, second = read_made(tmp_path)
    assert first == second
    assert first["command"] == "flowalign train 'a b'"
    assert first["versions"] == versions()


def test_rewards_have_bands_of_their_standard_error():
    from flowalign.run_report import _chart, _flat

    line = {"step": 0, "reward": {"a": 0.5}, "reward_std": {"a": 0.2}, "images": 16, "grad_norm": 0.0}
    chart = _chart("reward: a", {"run": [_flat(line), _flat({**line, "step": 1})]})
    (curve,) = chart.curves
    assert curve.low == pytest.approx([0.5 - 1.96 * 0.05] * 2)
    assert curve.high == pytest.approx([0.5 + 1.96 * 0.05] * 2)
    assert "standard errors" in chart.caption
    assert not _chart("training: gradient norm", {"run": [_flat(line)]}).curves[0].low


def test_rewards_on_training_prompts_have_an_interval_of_their_images():
    lines = [{"reward": {"pick": value}, "reward_std": {"pick": 2.0}, "images": 16} for value in (1.0, 3.0, 2.0, 2.0)]
    # The standard error of a step is 2 / sqrt(16), that of the mean of four steps half of it.
    assert _mean(lines, "pick") == "2 [1.51, 2.49]"
    assert _mean([{"reward": {"pick": 1.0}}], "pick") == "1"
    assert _mean(lines, "other") == ""
