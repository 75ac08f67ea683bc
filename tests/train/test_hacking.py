"""A run whose reward can be hacked: the shipped pipeline learns to make heavy files, and the monitors say so."""

import pytest

from flowalign import run
from flowalign.cli import main
from flowalign.run_config import load_config
from flowalign.train.fit import Alarmed
from flowalign.train.journal import read_log, status

# A smaller copy of the shipped run, which trips within the fewest steps that are compared.
SMALL = {"groups": 4, "group_size": 6, "rollout_batch_size": 24, "learning_rate": 2e-3, "sample_every": 0}


def test_a_hackable_reward_trips_the_monitors_and_the_best_step_is_kept(tmp_path, capsys):
    overrides = [word for name, value in SMALL.items() for word in (f"--train.{name}", str(value))]
    overrides += ["--pipeline.num_steps", "4", "--steps", "14", "--output", str(tmp_path / "run"), "--train.stop_on_alarm", "true"]
    with pytest.raises(Alarmed, match="held-out shapes falls, .* while jpeg_size rises"):
        run.run_training(load_config("shapes_hacked", overrides))
    assert "held-out shapes falls" in capsys.readouterr().out
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert "alarm" in lines[-1]
    assert all("alarm" not in line for line in lines[:-1])
    assert "ALARM x" in status(lines[-1])
    first, last = (
        {name: sum(line["reward"][name] for line in part) / 5 for name in ("jpeg_size", "shapes")} for part in (lines[:5], lines[-5:])
    )
    assert last["jpeg_size"] > first["jpeg_size"]
    assert last["shapes"] < 0.8 * first["shapes"]
    assert lines[-1]["monitor"]["gap/shapes"] > 2
    assert lines[0]["monitor"]["distance"] < lines[5]["monitor"]["distance"]
    kept = [int(path.name[5:]) for path in (tmp_path / "run" / "best").glob("step_*")]
    means = {done: sum(line["reward"]["shapes"] for line in lines[done - 5 : done]) / 5 for done in range(5, len(lines) + 1)}
    assert kept == [max(means, key=means.__getitem__)]
    assert kept[0] < len(lines)
    main(["report", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Alarms in: run." in page
    assert "held-out shapes falls" in page
