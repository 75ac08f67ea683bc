"""`flowalign lcsc` on runs of the tiny pipeline, LoRA and full weights."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowalign import generate, run
from flowalign.cli import main
from flowalign.core.combinations import combine
from flowalign.data import Prompt
from flowalign.lcsc import choose, lcsc, read_checkpoints
from flowalign.train import checkpoint
from tests.pipelines import tiny

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="module")
def train(model, tmp_path_factory):
    """Train once for each kind of weights; a rate that moves far, so that checkpoints differ in what they score."""
    done = {}

    def train(name, lora, **more):
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / name
            config = {
                "steps": STEPS,
                "output": str(folder),
                "pipeline": {"type": "sd3", "model": str(model), "num_steps": 2, "max_sequence_length": 16, "lora": lora},
                "prompts": {"num": 12},
                "rewards": [{"reward": "tests.train.brightness"}],
                "algorithm": {"type": "awm", "levels": "uniform", "num_levels": 1, "num_minibatches": 1},
                "train": {"groups": 2, "group_size": 2, "learning_rate": 2e-2, "keep_checkpoints": 9, **more},
            }
            path = folder.with_suffix(".yaml")
            path.write_text(yaml.safe_dump(config))
            run.train(str(path))
            done[name] = folder
        return done[name]

    return train


@pytest.fixture(scope="module")
def lora_run(train):
    return train("lora", {"rank": 4, "alpha": 8}, ema_decay=0.9)


@pytest.fixture(scope="module")
def searched(lora_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("lcsc") / "lcsc"
    return output, lcsc(lora_run, output=output, budget=9, num_prompts=4)


def test_the_saved_lora_is_the_combination_of_the_checkpoints_that_scored_best(lora_run, searched):
    output, summary = searched
    lines = [json.loads(line) for line in (output / "search.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == summary["budget"] == 9
    best = max(lines, key=lambda line: line["score"])
    assert best["score"] == summary["search"]["best"] >= summary["search"]["newest"] == lines[0]["score"]
    assert len({line["score"] for line in lines}) > 3
    tables = [checkpoint.load(lora_run / "checkpoints" / f"step_{step + 1:06d}")[1]["roles"]["current"] for step in range(STEPS)]
    expected = combine(tables, best["coefficients"])
    stored = load_file(output / "weights" / "pytorch_lora_weights.safetensors")
    assert {name.removeprefix("transformer.") for name in stored} == set(expected)
    assert all(torch.equal(tensor, expected[name.removeprefix("transformer.")]) for name, tensor in stored.items())
    assert list(summary["coefficients"]) == ["1", "2", "3"]
    assert json.loads((output / "summary.json").read_text()) == summary


def test_the_check_is_paired_with_what_the_run_is_for_on_other_prompts(lora_run, searched):
    _, summary = searched
    assert set(summary["check"]) >= {"mean", "low", "high", "p_value"}
    _, tables, result = read_checkpoints(lora_run)
    average = checkpoint.load(lora_run / "checkpoints" / f"step_{STEPS:06d}")[1]["roles"]["average"]
    assert all(torch.equal(result[name], average[name]) for name in average)
    assert not all(torch.equal(result[name], tables[-1][name]) for name in average)


def test_a_search_that_was_interrupted_goes_on_and_ends_the_same(lora_run, searched, tmp_path, monkeypatch):
    output, summary = searched
    torn = tmp_path / "lcsc"
    torn.mkdir()
    lines = (output / "search.jsonl").read_text().splitlines(keepends=True)
    (torn / "search.jsonl").write_text("".join(lines[:7]))
    calls = []
    honest = generate.generator_of
    monkeypatch.setattr("flowalign.lcsc.generator_of", lambda *args, **options: (calls.append(1), honest(*args, **options))[1])
    again = lcsc(lora_run, output=torn, budget=9, num_prompts=4)
    assert again == summary
    assert (torn / "search.jsonl").read_text() == "".join(lines)
    assert len(calls) == 3 + 2  # three combinations were missing; the check scores two
    for other in ({"seed": 1}, {"reward": ["jpeg_size"]}):
        with pytest.raises(ValueError, match="is a search with other checkpoints, prompts, rewards or seed"):
            lcsc(lora_run, output=torn, budget=9, num_prompts=4, **other)


def test_the_result_is_evaluated_and_sampled_like_a_run(searched, model):
    output, _ = searched
    settings, pipeline = generate.open_model(str(model), output)
    assert settings.num_steps == 2
    tensors = pipeline.roles.parameters("current")
    stored = load_file(output / "weights" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(tensor, stored[f"transformer.{name}"]) for name, tensor in tensors.items())


def test_full_weights_are_combined_and_saved_as_a_pipeline(train, capsys, tmp_path):
    folder = train("full", None)
    main(["lcsc", str(folder), "--budget", "4", "--num-prompts", "2"])
    assert "coefficients  step 1:" in capsys.readouterr().out
    summary = json.loads((folder / "lcsc" / "summary.json").read_text())
    _, tables, _ = read_checkpoints(folder)
    expected = combine(tables, list(summary["coefficients"].values()))
    pipe = tiny.untouched(folder / "lcsc" / "weights")
    for name, tensor in pipe.transformer.named_parameters():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_with_too_little_to_combine_is_told_what_to_do(lora_run, tmp_path, capsys):
    few = tmp_path / "few"
    shutil.copytree(lora_run, few)
    shutil.rmtree(few / "checkpoints" / "step_000001")
    (few / "checkpoints" / "step_000002" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="has 1 whole checkpoints, needed at least 2; train with --train.keep_checkpoints 10"):
        lcsc(few)
    assert "step_000002: state.safetensors is truncated" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not a run folder"):
        lcsc(tmp_path)
    with pytest.raises(ValueError, match="got budget 0"):
        lcsc(lora_run, budget=0)


def test_search_and_check_share_no_prompt():
    prompts = [Prompt(text=f"p{i % 9}", uid=i) for i in range(20)]
    search, check = choose(prompts, 64, 0)
    assert len(search) == len(check) == 4
    assert len({prompt.text for prompt in [*search, *check]}) == 8
    with pytest.raises(ValueError, match="got 3 distinct ones, needed at least 4"):
        choose(prompts[:3], 1, 0)
