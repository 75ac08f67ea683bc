"""`flowalign evaluate` on several training seeds, with tests corrected for their number, and beside real images."""

import json

import pytest
import torch

from flowalign import evaluation, generate, run
from flowalign.cli import main
from flowalign.config import ConfigError
from flowalign.core.randomness import generator
from flowalign.evaluate.statistics import seed_difference_interval
from flowalign.images import save_png
from flowalign.run_config import load_config

SMALL = {"num_prompts": 6, "images_per_prompt": 2}


@pytest.fixture
def seeds(write_config):
    """Three runs of one recipe that differ in their seed alone."""
    found = []
    for seed in range(3):
        path = write_config(f"seed_{seed}", seed=seed, steps=1)
        run.train(str(path), ["--train.learning_rate", "3e-1"])
        found.append(load_config(str(path)).output)
    return found


def bright(prompts, images):
    return images.mean((1, 2, 3))


def dark(prompts, images):
    return 1 - images.mean((1, 2, 3))


def test_several_training_seeds_are_told_apart_from_the_noise_of_evaluation(seeds, model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("".join(f"a photo of {number} rings\n" for number in range(8)))
    rewards = [f"tests.train.test_evaluating.{name}" for name in ("bright", "dark")]
    asked = {
        "suite_name": "prompts",
        "options": {"prompts": tmp_path / "prompts.txt", "reward": rewards},
        "images_per_prompt": 2,
        "extractor": "random",
    }
    result = evaluation.evaluate(str(model), lora=seeds, output=tmp_path / "found", resolution=1e-9, **asked)
    gains = [evaluation.evaluate(str(model), lora=folder, **asked)["paired_difference"]["bright"]["mean"] for folder in seeds]
    found = result["training_seeds"]["bright"]
    assert len(set(gains)) == 3
    assert list(found["gains"]) == pytest.approx(gains)
    assert found["spread"] == pytest.approx(float(torch.tensor(gains, dtype=torch.float64).std()))
    assert found["over_seeds"]["mean"] == pytest.approx(sum(gains) / 3)
    assert result["paired_difference"]["bright"]["mean"] == pytest.approx(sum(gains) / 3)
    assert result["training_seeds"]["dark"]["gains"] == pytest.approx([-gain for gain in gains], abs=1e-7)
    assert len(result["tuned"]) == len(result["fidelity"]) == 3
    said = result["verdict"]["bright"]
    assert "over 3 training seeds" in said
    assert "by Holm over 2 tests" in said
    assert "+-1e-09 needs at most about" in said
    assert "gains of the runs: " in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "found").iterdir()}
    assert {"records.jsonl", "records_2.jsonl", "records_3.jsonl", "records_base.jsonl"} <= names
    assert json.loads((tmp_path / "found" / "summary.json").read_text())["training_seeds"] == json.loads(
        json.dumps(result["training_seeds"])
    )
    page = (tmp_path / "found" / "report.html").read_text()
    assert all(title in page for title in ("Training seeds", "Tests by kind", "Fidelity and diversity"))


def test_runs_of_different_recipes_are_no_training_seeds(seeds, write_config, model):
    path = write_config("other", seed=5, steps=1)
    run.train(str(path), ["--train.learning_rate", "2e-1"])
    other = load_config(str(path)).output
    with pytest.raises(ValueError, match=r"other is of another recipe than .*seed_0 \(train.learning_rate: 0.3 -> 0.2\)"):
        evaluation.evaluate(str(model), lora=[seeds[0], other], **SMALL)
    with pytest.raises(ValueError, match="a run is given twice"):
        evaluation.evaluate(str(model), lora=[seeds[0], seeds[0]], **SMALL)


def test_training_seeds_of_two_recipes_are_compared(seeds, write_config, model, tmp_path, capsys):
    others = []
    for seed in range(2):
        path = write_config(f"other_{seed}", seed=seed, steps=1)
        run.train(str(path), ["--train.learning_rate", "1e-3"])
        others.append(str(load_config(str(path)).output))
    (tmp_path / "prompts.txt").write_text("".join(f"a photo of {number} rings\n" for number in range(8)))
    asked = {
        "suite_name": "prompts",
        "options": {"prompts": tmp_path / "prompts.txt", "reward": ["tests.train.test_evaluating.bright"]},
        "images_per_prompt": 2,
        "extractor": "random",
    }
    result = evaluation.evaluate(str(model), lora=seeds, against=others, output=tmp_path / "found", **asked)
    apart = [[evaluation.evaluate(str(model), lora=folder, against=other, **asked) for other in others] for folder in seeds]
    gains = [[found["paired_difference"]["bright"]["mean"] for found in row] for row in apart]
    found = result["training_seeds"]["bright"]
    assert list(found["gains"]) == pytest.approx([sum(row) / 2 for row in gains])
    assert found["num_bases"] == 2
    means = [summary["bright"]["overall"]["mean"] for summary in result["base"]]
    welch = seed_difference_interval(means, [summary["bright"]["overall"]["mean"] for summary in result["tuned"]])
    assert [found["over_seeds"][key] for key in ("mean", "low", "high")] == pytest.approx([welch.mean, welch.low, welch.high])
    assert "over 3 against 2 training seeds" in result["verdict"]["bright"]
    assert "the first of 3 runs and of 2 others" in capsys.readouterr().out
    assert (tmp_path / "found" / "records_base_2.jsonl").is_file()


@pytest.mark.parametrize(
    ("loras", "message"),
    [(0, "--against: got 2 training seeds, but 0 of --lora"), (1, "--against: got 2 training seeds, but 1 of --lora")],
)
def test_training_seeds_on_one_side_alone_are_refused(seeds, model, loras, message):
    with pytest.raises(ConfigError, match=message):
        evaluation.evaluate(str(model), lora=seeds[:loras], against=[str(folder) for folder in seeds[1:]], **SMALL)
    with pytest.raises(ConfigError, match="--against: a run is given twice"):
        evaluation.evaluate(str(model), lora=seeds, against=[str(seeds[0])] * 2, **SMALL)


def test_the_command_measures_fidelity_to_a_folder_and_refuses_it_before_it_generates(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a ring\na star\na circle\n")
    size = evaluation.image_size(generate.open_model(str(model), None)[1])
    for number in range(7):
        save_png(torch.rand(3, *size, generator=generator("real", number)), tmp_path / "real" / f"{number}.png")
    asked = [
        "evaluate",
        str(model),
        "--suite",
        "prompts",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--reward",
        "{type: jpeg_size, want: large}",
    ]
    asked += [
        "--num-steps",
        "2",
        "--images-per-prompt",
        "2",
        "--reference-images",
        str(tmp_path / "real"),
        "--output",
        str(tmp_path / "out"),
    ]
    main(asked)
    told = capsys.readouterr().out
    assert "Kernel distance (KID) x 1000" in told
    assert "reference: " in told
    assert "Not measured: Frechet distance" in told
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["fidelity"]["model"]["kernel_distance"]["mean"] > 0
    assert "Fidelity and diversity" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "real" / "6.png").unlink()
    (tmp_path / "real" / "5.png").unlink()
    monkeypatch.setattr(generate, "score_model", lambda *a, **k: pytest.fail("it generates"))
    with pytest.raises(SystemExit):
        main(asked)
    assert "images: got 5, needed at least 6" in capsys.readouterr().err
