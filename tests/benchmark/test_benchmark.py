"""Methods at equal compute: what is refused, what is counted, what a crash leaves, and what is reported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from flowalign.benchmark import report, study
from flowalign.benchmark.cell import run_cell
from flowalign.benchmark.meter import Meter
from flowalign.benchmark.prices import price
from flowalign.benchmark.spec import load_benchmark
from flowalign.benchmark.store import folder_of, read_result
from flowalign.cli import main
from flowalign.config import ConfigError
from flowalign.evaluate.records import read_evaluation
from tests.pipelines import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture
def write(model, tmp_path):
    """Write a small benchmark of AWM and Flow-GRPO; keyword arguments replace whole keys."""
    run = {
        "steps": 3,
        "pipeline": {"type": "sd3", "model": str(model), "num_steps": 3, "max_sequence_length": 16, "lora": {"rank": 2, "alpha": 4}},
        "rewards": [{"reward": {"type": "shapes", "strict": 0.0}}],
        "algorithm": {
            "type": "awm",
            "levels": "uniform",
            "num_levels": 2,
            "num_minibatches": 1,
            "reference_penalty": 0.1,
            "slow_penalty": 0.0,
        },
        "train": {"groups": 2, "group_size": 4, "micro_batch_size": 8},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    def make(**changes):
        spec = {
            "output": str(tmp_path / "benchmark"),
            "base": str(tmp_path / "run.yaml"),
            "methods": {"awm": {}, "flow_grpo": {"algorithm": {"type": "flow_grpo", "num_minibatches": 1, "kl_penalty": 0.0}}},
            "seeds": [0, 1],
            "budget": {"evaluations": 400},
            "milestones": 2,
            "suite": {"num_prompts": 6, "images_per_prompt": 2},
            **changes,
        }
        path = tmp_path / "benchmark.yaml"
        path.write_text(yaml.safe_dump(spec))
        return path

    return make


@pytest.fixture
def in_process(monkeypatch):
    """Run cells here, which is much faster than starting an interpreter for each."""

    class Done:
        def __init__(self, command, **rest):
            self.code = 0
            try:
                run_cell(study.Path(command[3]))
            except Exception as error:
                rest["stdout"].write(str(error).encode())
                self.code = 1

        def wait(self):
            return self.code

        def terminate(self):
            pass

    monkeypatch.setattr(study.subprocess, "Popen", Done)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {}}, "needed exactly one of evaluations, flops, seconds"),
        ({"budget": {"flops": 1.0, "seconds": 1.0}}, "got flops and seconds"),
        ({"budget": {"evaluations": -1}}, "needed a positive number"),
        ({"methods": {}}, "methods: got none"),
        ({"methods": {"a b": {}, "a_b": {}}}, "would share a folder"),
        ({"methods": {"awm": {"train.learnin_rate": 1}}}, "methods.awm: .*did you mean 'learning_rate'"),
        ({"methods": {"awm": {"base": "absent"}}}, "methods.awm: absent: no such file"),
        ({"reference": "awn"}, "reference: got 'awn'"),
        ({"common": {"base": "shapes_awm"}}, "common.base: is the benchmark's own key base"),
        ({"common": {"train.learnin_rate": 1}}, "methods.awm: .*did you mean 'learning_rate'"),
        ({"seeds": [0, 0]}, "seeds: got"),
        ({"search": {"grid": {"train.learning_rate": 1e-3}}}, "needed a list of values"),
        ({"search": {"grid": {"train.learning_rate": [1e-3, 1e-4]}, "seed": 1}}, "a search on them would favour"),
        ({"search": {"grid": {"train.learning_rate": [1e-3, -1.0]}}}, "methods.awm: .*learning_rate: got -1"),
        ({"sede": [1]}, "did you mean 'seeds'"),
        ({"suite": {"name": "shpes"}}, "suite: got 'shpes', did you mean 'shapes'"),
        ({"suite": {"images_per_prompt": 1}}, "got num_prompts 120 and images_per_prompt 1, needed at least 3 and 2: diversity"),
        ({"suite": {"num_prompts": 2}}, "got num_prompts 2 and images_per_prompt 2, needed at least 3 and 2"),
        ({"methods": {"nft": {"algorithm": {"type": "diffusion_nft", "old_max": 2}}}}, "methods.nft: .*2"),
        ({"suite": {"detector": "x"}}, "suite.detector: is an option of suite geneval, not of 'shapes'"),
        ({"suite": {"name": "prompts", "prompts": "p.txt"}}, "suite.reward: is needed by suite prompts"),
        ({"suite": {"name": "prompts", "prompts": "p.txt", "reward": ["jpeg_size"]}}, "suite.measure: is needed by suite prompts"),
    ],
)
def test_a_benchmark_that_cannot_be_meant_is_refused_before_it_begins(write, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_benchmark(write(**changes), [])


def test_seconds_are_measured_one_run_at_a_time(write):
    with pytest.raises(ValueError, match="use --jobs 1"):
        study.benchmark(str(write(budget={"seconds": 5})), jobs=2)


def test_a_cell_s_folder_changes_with_whatever_changes_its_result(write):
    config = load_benchmark(write(), [])
    cell = config.final("awm", {}, 0)
    others = [replace(cell, seed=1), replace(cell, amount=800.0), config.final("awm", {"train.groups": 3}, 0), replace(cell, milestones=3)]
    assert len({folder_of(config, other) for other in [cell, *others]}) == 5
    assert config.trials("awm") == []
    assert len(config.bases()) == 1  # both methods sample alike before training
    guided = load_benchmark(write(methods={"awm": {}, "guided": {"pipeline.guidance_scale": 4.0}}), [])
    assert len(guided.bases()) == 2


def test_a_cell_is_known_by_what_is_meant_and_not_by_how_it_is_written(write, tmp_path):
    path = write()
    cell = load_benchmark(path, []).final("awm", {}, 0)
    spelled_out = load_benchmark(write(methods={"awm": {"train.groups": 2}}), []).final("awm", {}, 0)
    assert spelled_out.name == cell.name
    run = tmp_path / "run.yaml"
    run.write_text(run.read_text().replace("num_levels: 2", "num_levels: 1"))
    assert load_benchmark(write(), []).final("awm", {}, 0).name != cell.name


def flops_of_a_row(config, method):
    """Of the denoiser's matrix products on one row: those of a pass without gradient, and of one with its backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from flowalign.run_config import load_config

    cell = config.final(method, {}, 0)
    pipeline = load_config(cell.base, cell.arguments(Path("run"))).pipeline.build()
    cond = pipeline.encode(["a", "b", "c"])
    x, sigma = torch.zeros(3, *pipeline.event_shape), torch.tensor(0.5)
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        pipeline.velocity(x, sigma, cond)
    with FlopCounterMode(display=False) as both:
        pipeline.velocity(x, sigma, cond).sum().backward()
    return plain.get_total_flops() / 3, both.get_total_flops() / 3


def test_what_runs_spend_is_what_the_formulas_say_and_never_more_than_the_budget(write, in_process):
    config = load_benchmark(write(), [])
    study.benchmark(str(write()))
    images, steps, levels = 8, 3, 2
    each = {
        "awm": (images * steps + images * levels, images * levels),  # sampling and the reference's pass; training
        "flow_grpo": (images * steps, images * (steps - 1)),
    }
    for method, (sampled, trained) in each.items():
        result = read_result(config, config.final(method, {}, 0))
        spent, num = result["spent"], result["steps"]
        assert (spent["rows_sampled"], spent["rows_trained"]) == (num * sampled, num * trained)
        assert spent["evaluations"] == num * (sampled + 3 * trained) <= 400 < (num + 1) * (sampled + 3 * trained)
        plain, both = flops_of_a_row(config, method)
        assert plain < both < 3 * plain  # adapters need no gradient of frozen weights
        assert spent["flops"] == pytest.approx(spent["rows_sampled"] * plain + spent["rows_trained"] * both, rel=1e-6)
        assert [milestone["step"] for milestone in result["milestones"]][-1] == num
        assert set(result["milestones"][-1]) >= {"score", "scores", "velocity_distance", "diversity", "kernel_distance"}


def test_a_meter_counts_rows_by_whether_they_carry_a_gradient_and_nothing_in_a_pause():
    from torch import nn

    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    wrapped = nn.Module()
    wrapped.network = network
    wrapped.forward = lambda x: (network(x),)
    meter = Meter(network=wrapped, forward=10.0, backward=15.0)
    x = torch.zeros(5, 8)
    with meter.attached():
        wrapped(x)
        with torch.no_grad():
            wrapped(x[:2])
        with meter.pause():
            wrapped(x)
    wrapped(x)
    assert (meter.trained, meter.sampled) == (5, 2)
    assert meter.evaluations == 3 * 5 + 2
    assert meter.flops == 7 * 10 + 5 * 15


def test_a_benchmark_searches_reports_and_goes_on_where_it_was_stopped(write, in_process, capsys):
    grid = {"train.learning_rate": [1e-4, 1e-2]}
    path = write(search={"grid": grid, "share": 0.5}, target=0.9, seeds=[0, 1])
    report = study.benchmark(str(path))
    text = report.read_text()
    assert "Score at the end of the budget" in text
    assert "Strict score against compute" in text
    assert "Strict score against drift" in text
    shown = capsys.readouterr().out
    assert shown.count("chosen |") + shown.count("the first of equals") == 2
    assert "| awm | 0 of 2 |  |" in shown
    config = load_benchmark(path, [])
    cells = [cell for method in config.methods for cell in config.trials(method)]
    rewards = [read_result(config, cell)["reward"] for cell in cells]
    best = max(range(2), key=lambda k: rewards[k])
    final = folder_of(config, config.final("awm", config.search.points()[best], 0))
    assert len(read_evaluation(final / "records.jsonl").records) == 12
    written = {path: path.stat().st_mtime_ns for path in config.output.rglob("result.json")}
    assert len(written) == 1 + 4 + 4
    study.benchmark(str(path))
    assert written == {path: path.stat().st_mtime_ns for path in config.output.rglob("result.json")}
    chain = write(search={"grid": grid, "share": 0.5}, target=0.9, seeds=[0, 1], reference="previous")
    study.benchmark(str(chain))
    shown = capsys.readouterr().out
    assert "gain less that of the line above, over seeds" in shown
    results = json.loads((config.output / "results.json").read_text())["runs"]
    strict = [[result["milestones"][-1]["score"] for result in results[first : first + 2]] for first in (0, 2)]
    # Both have one base, so that the difference of gains is that of scores.
    added = [two - one for one, two in zip(*strict, strict=True)]
    assert f"| {sum(added) / 2:.3f} [" in shown
    more = write(search={"grid": grid, "share": 0.5}, target=0.9, seeds=[0, 1, 2])
    study.benchmark(str(more))
    assert len(list(config.output.rglob("result.json"))) == 1 + 4 + 6
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_a_crashed_cell_loses_no_other_and_is_tried_again(write, in_process, monkeypatch, capsys):
    path = write(seeds=[0])
    config = load_benchmark(path, [])
    broken = folder_of(config, config.final("awm", {}, 0))
    kept = study.subprocess.Popen

    def crash(command, **rest):
        if command[3] == str(broken):
            command = [*command[:3], str(broken / "absent")]
        return kept(command, **rest)

    monkeypatch.setattr(study.subprocess, "Popen", crash)
    study.benchmark(str(path))
    shown = capsys.readouterr().out
    assert "Not finished: awm, seed 0" in shown
    assert study.missing(config.output / "report.html") == ["awm, seed 0"]
    with pytest.raises(SystemExit) as left:
        main(["benchmark", str(path)])
    assert left.value.code == 1
    assert read_result(config, config.final("flow_grpo", {}, 0)) is not None
    monkeypatch.setattr(study.subprocess, "Popen", kept)
    study.benchmark(str(path))
    assert read_result(config, config.final("awm", {}, 0)) is not None


def test_any_prompts_and_rewards_can_be_what_methods_are_compared_by(write, in_process, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\ntwo green triangles\n")
    asked = {"name": "prompts", "prompts": str(tmp_path / "prompts.txt"), "reward": ["jpeg_size"], "measure": "jpeg_size"}
    path = write(seeds=[0], suite={**asked, "num_prompts": 3, "images_per_prompt": 2})
    report = study.benchmark(str(path))
    assert "Jpeg_size against compute" in report.read_text()
    assert "| method | seeds | jpeg_size | gain over the base |" in capsys.readouterr().out
    config = load_benchmark(path, [])
    milestone = read_result(config, config.final("awm", {}, 0))["milestones"][-1]
    assert milestone["score"] == milestone["scores"]["jpeg_size"]
    assert 0 <= milestone["precision"] <= 1
    before = config.final("awm", {}, 0).name
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    assert load_benchmark(path, []).final("awm", {}, 0).name != before
    wrong = write(seeds=[0], suite={**asked, "measure": "clip_score"})
    with pytest.raises(ValueError, match="no image has a score 'clip_score'; there are jpeg_size"):
        study.benchmark(str(wrong))


def test_trials_are_told_apart_by_their_last_update(write, in_process, tmp_path):
    """A trial of one step logs the reward of the model before it, which is the same for all rates."""
    path = write(seeds=[0], methods={"awm": {}}, search={"grid": {"train.learning_rate": [1e-9, 3e-1]}, "share": 0.25})
    run = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**run, "rewards": [{"reward": {"type": "jpeg_size"}}]})
    )  # tells any two images apart
    study.benchmark(str(path))
    config = load_benchmark(path, [])
    still, wild = (read_result(config, cell) for cell in config.trials("awm"))
    assert (still["steps"], wild["steps"]) == (1, 1)
    assert still["reward"] != wild["reward"]


def test_runs_by_different_software_are_said_to_be(write, in_process, capsys):
    path = write(seeds=[0])
    study.benchmark(str(path))
    assert "Runs differ in" not in capsys.readouterr().out
    config = load_benchmark(path, [])
    result = folder_of(config, config.final("awm", {}, 0)) / "result.json"
    found = json.loads(result.read_text())
    result.write_text(json.dumps({**found, "versions": {**found["versions"], "torch": "1.0"}}))
    study.benchmark(str(path))
    assert "Runs differ in torch: 1.0 (1), " in capsys.readouterr().out


def test_a_method_whose_search_fails_is_left_out_and_named(write, in_process, monkeypatch, capsys):
    path = write(seeds=[0], search={"grid": {"train.learning_rate": [1e-4, 1e-2]}, "share": 0.5})
    config = load_benchmark(path, [])
    broken = {str(folder_of(config, cell)) for cell in config.trials("awm")}
    kept = study.subprocess.Popen
    absent = str(folder_of(config, config.trials("awm")[0]) / "absent")
    monkeypatch.setattr(
        study.subprocess,
        "Popen",
        lambda command, **rest: kept([*command[:3], absent if command[3] in broken else command[3]], **rest),
    )
    study.benchmark(str(path))
    shown = capsys.readouterr().out
    assert "No trial of the search finished, so not run: awm." in shown
    assert "| awm | 0 |" in shown
    assert read_result(config, config.final("flow_grpo", {"train.learning_rate": 1e-2}, 0)) or read_result(
        config, config.final("flow_grpo", {"train.learning_rate": 1e-4}, 0)
    )


def test_a_budget_below_one_step_is_refused(write, in_process, capsys):
    path = write(budget={"evaluations": 10}, seeds=[0])
    study.benchmark(str(path))
    config = load_benchmark(path, [])
    said = (folder_of(config, config.final("awm", {}, 0)) / "output.txt").read_text()
    assert "one step costs 88 evaluations, more than the 10 there are" in said


def test_a_cell_runs_in_an_interpreter_of_its_own(write):
    path = write(seeds=[0], methods={"awm": {}}, budget={"evaluations": 100}, milestones=1)
    study.benchmark(str(path))
    result = json.loads(next(load_benchmark(path, []).output.glob("awm/*/result.json")).read_text())
    assert result["steps"] == 1


def test_the_price_of_a_score():
    course = [
        {"score": 0.5, "spent": {"flops": 10.0}},
        {"score": 0.4, "spent": {"flops": 20.0}},
        {"score": 0.8, "spent": {"flops": 30.0}},
    ]
    assert price(course, 0.2, 0.35, "flops") == pytest.approx(5.0)  # never below it again
    assert price(course, 0.2, 0.45, "flops") == pytest.approx(21.25)  # what was reached at 20 was lost again
    assert price(course, 0.2, 0.6, "flops") == pytest.approx(25.0)
    assert price(course, 0.2, 0.9, "flops") is None
    assert price(course, 0.4, 0.4, "flops") == 0.0


def test_what_all_methods_change_is_written_once_and_a_method_s_own_changes_come_on_top(write):
    config = load_benchmark(write(common={"train.learning_rate": 3e-4}, methods={"awm": {}, "faster": {"train.learning_rate": 1e-3}}), [])
    assert [config.final(method, {}, 0).overrides["train.learning_rate"] for method in config.methods] == [3e-4, 1e-3]
    alone = load_benchmark(write(methods={"awm": {"train.learning_rate": 3e-4}}), [])
    assert config.final("awm", {}, 0).name == alone.final("awm", {}, 0).name


@pytest.mark.parametrize(
    ("reference", "heading", "ratio"), [(None, "awm's over it", "0.5 [0.5, 0.5]"), ("previous", "the line above's over it", "")]
)
def test_prices_are_compared_seed_by_seed(write, monkeypatch, reference, heading, ratio):
    found = {"awm": {0: 100.0, 1: 200.0}, "late": {0: 300.0, 1: None}, "slow": {0: 200.0, 1: 400.0}}
    config = load_benchmark(write(methods={name: {} for name in found}, target=0.9, reference=reference), [])
    monkeypatch.setattr(report, "_prices_of", lambda config, runs, rule: runs)
    table = report._prices(config, found)
    assert (table.columns[3], table.columns[6]) == (f"{heading}, to stay", f"{heading}, for the first time")
    assert [row[1] for row in table.rows] == ["2 of 2", "1 of 2", "2 of 2"]
    # Not where a seed got nowhere, on either side.
    assert [row[3] for row in table.rows] == ["", "", ratio]


def test_a_run_that_diverges_counts_with_what_was_last_measured(write, in_process, monkeypatch, capsys):
    from flowalign.train.fit import Trainer

    path = write(seeds=[0, 1], milestones=2, target=0.9)
    honest = Trainer.step

    def diverge(self, step):
        if self.seed == 1 and type(self.algorithm).__name__ == "AWM" and step == 1:
            raise FloatingPointError("the loss is nan")
        return honest(self, step)

    monkeypatch.setattr(Trainer, "step", diverge)
    study.benchmark(str(path))
    shown = capsys.readouterr().out
    assert "Failed: awm, seed 1: the loss is nan" in shown
    config = load_benchmark(path, [])
    result = read_result(config, config.final("awm", {}, 1))
    assert result["steps"] == 1
    base = read_evaluation(config.output / "base" / config.final("awm", {}, 1).reference / "records.jsonl").scores().overall.mean
    assert result["milestones"][-1]["score"] == base
    assert "| awm | 2 |" in shown
    assert "| awm | 0 of 2 |" in shown


@pytest.mark.parametrize("where", ["rollout", "suite"])
def test_a_run_whose_images_are_not_finite_counts_and_has_no_price(write, in_process, monkeypatch, where):
    """Its weights and losses may be finite all along; a suite's own error would look like a crash and drop the seed."""
    from flowalign.pipelines.base import FlowPipeline

    path = write(target=0.0)
    config = load_benchmark(path, [])
    cell = config.final("awm", {}, 1)
    honest, cell_of, now = FlowPipeline.decode, run_cell, {}

    def decode(self, x, **options):
        made = honest(self, x, **options)
        scoring = len(x) == 12  # the suite's images; a rollout has 8
        now["broken"] = now.get("broken", 0) + (now.get("inside", False) and scoring == (where == "suite"))
        return made * float("nan") if now["broken"] > (1 if where == "rollout" else 0) else made

    def run(folder, **options):
        now.clear()
        now["inside"] = Path(folder).name == folder_of(config, cell).name
        return cell_of(folder, **options)

    monkeypatch.setattr(FlowPipeline, "decode", decode)
    monkeypatch.setattr("tests.benchmark.test_benchmark.run_cell", run)
    study.benchmark(str(path))
    result = read_result(config, cell)
    assert "hold values that are not finite" in result["failed"]
    assert result["milestones"][-1]["score"] >= 0
    text = (config.output / "results.md").read_text()
    assert "Failed: awm, seed 1: " in text
    assert "Not finished" not in text
    row = next(line for line in text.split("Price of")[1].splitlines() if line.startswith("| awm |"))
    assert "1 of 2" in row


def test_a_base_that_cannot_be_scored_costs_its_own_methods_alone(write, in_process, monkeypatch):
    search = {"grid": {"train.learning_rate": [1e-4, 1e-3]}, "share": 0.5}
    path = write(methods={"guided": {"pipeline.guidance_scale": 4.0}, "awm": {}}, search=search, reference="awm", seeds=[0])
    config = load_benchmark(path, [])
    lost, honest = config.final("guided", {}, 0).reference, run_cell

    def run(folder, **options):
        if Path(folder).name == lost:
            raise ValueError("no such luck")
        return honest(folder, **options)

    monkeypatch.setattr("tests.benchmark.test_benchmark.run_cell", run)
    study.benchmark(str(path))
    text = (config.output / "results.md").read_text()
    assert "Not run: guided, whose base could not be scored: no such luck" in text
    assert text.count("| awm | train.learning_rate") == 2
    assert any(read_result(config, config.final("awm", point, 0)) for point in config.search.points())
    assert not folder_of(config, config.final("guided", {}, 0)).exists()


def test_a_rehearsal_refuses_a_method_before_the_study_begins(write):
    changes = {"nft": {"algorithm": {"type": "diffusion_nft", "num_levels": 9}}}
    with pytest.raises(ConfigError, match="methods.nft: num_levels: got 9, needed 1 to 3"):
        load_benchmark(write(methods=changes), [])


def test_equal_trials_are_no_choice_and_are_said_to_be_none(write, in_process, capsys):
    # Rates that move nothing.
    grid = {"train.learning_rate": [1e-30, 2e-30]}
    path = write(seeds=[0], budget={"evaluations": 100}, search={"grid": grid, "share": 1.0})
    study.benchmark(str(path))
    assert capsys.readouterr().out.count("the first of equals: no choice") == 2


def test_a_study_that_is_stopped_reports_what_has_finished(write, in_process, monkeypatch):
    path = write()
    config = load_benchmark(path, [])
    last, honest = str(folder_of(config, config.final("flow_grpo", {}, 1))), study.subprocess.Popen

    def stop(command, **rest):
        if command[3] == last:
            raise KeyboardInterrupt
        return honest(command, **rest)

    monkeypatch.setattr(study.subprocess, "Popen", stop)
    with pytest.raises(KeyboardInterrupt):
        study.benchmark(str(path))
    assert study.missing(config.output / "report.html") == ["flow_grpo, seed 1"]
    assert "Not finished: flow_grpo, seed 1" in (config.output / "report.html").read_text()


def test_methods_of_different_bases_are_compared_by_one_quantity(write, in_process):
    methods = {"awm": {}, "guided": {"pipeline.guidance_scale": 4.0}}
    suite = {"num_prompts": 6, "images_per_prompt": 2, "reward": ["jpeg_size"], "measure": "jpeg_size"}
    path = write(methods=methods, suite=suite)
    study.benchmark(str(path))
    config = load_benchmark(path, [])
    ends = {name: [read_result(config, config.final(name, {}, seed))["milestones"][-1]["score"] for seed in (0, 1)] for name in methods}
    expected = sum(ends["guided"]) / 2 - sum(ends["awm"]) / 2
    cell = next(line for line in (config.output / "results.md").read_text().splitlines() if line.startswith("| guided | 2 |")).split("|")[5]
    over_prompts, over_seeds = (float(text.split()[0]) for text in cell.split("over seeds"))
    assert over_prompts == pytest.approx(expected, abs=6e-4)
    assert over_seeds == pytest.approx(expected, abs=6e-4)


def test_two_studies_in_one_folder_are_refused(write, in_process):
    from flowalign.run import alone_in

    path = write(seeds=[0])
    with alone_in(load_benchmark(path, []).output), pytest.raises(ConfigError, match="another process"):
        study.benchmark(str(path))


def test_each_line_of_the_factor_study_changes_one_factor():
    """But for the algorithm's own fields where the algorithm itself changes."""
    from flowalign import config as configuration
    from flowalign.run_config import find_config, load_config

    config = load_benchmark(find_config("benchmark_factors"), [])
    changed = {
        "without guidance": {"pipeline.guidance_scale"},
        "fewer trained steps": {"algorithm.num_trained"},
        "matching surrogate": set(),
        "levels between steps": {"algorithm.levels"},
        "ODE sampler": {"algorithm.noise_level"},
        "AWM's weighting": {"algorithm.weighting"},
        "twice the updates": {"algorithm.num_minibatches"},
        "penalty": {"algorithm.reference_penalty"},
        "average": {"train.ema_decay"},
        "half the batch": {"train.groups"},
    }
    lines, samplers = {}, {}
    for method in config.methods:
        cell = config.final(method, {"train.learning_rate": 1e-3}, 0)
        run = load_config(cell.base, cell.arguments(Path("run")))
        lines[method] = flat(configuration.encode(run))
        plan = run.algorithm.build().plan(0, run.pipeline.num_steps)
        samplers[method] = [step.kernel for step in plan.steps]
        assert not plan.has_siblings
    # The sampler is one factor and changes on its own line alone.
    assert samplers["flow_grpo with guidance"] == samplers["matching surrogate"] == samplers["levels between steps"]
    assert samplers["ODE sampler"] == samplers["half the batch"] != samplers["matching surrogate"]
    assert lines["matching surrogate"]["algorithm.num_levels"] == lines["fewer trained steps"]["algorithm.num_trained"]
    names = list(lines)
    assert list(changed) == names[1:]
    for before, after in zip(names, names[1:], strict=False):
        one, two = lines[before], lines[after]
        found = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)} - {"steps"}
        if one["algorithm.type"] != two["algorithm.type"]:
            found = {key for key in found if not key.startswith("algorithm.")}
        assert found == changed[after], after


def test_the_methods_of_the_shipped_comparison_share_optimizer_and_average():
    from flowalign.run_config import find_config, load_config

    config = load_benchmark(find_config("benchmark_shapes"), [])
    cells = [config.final(method, config.search.points()[0], 0) for method in config.methods]
    trains = [load_config(cell.base, cell.arguments(Path("run"))).train for cell in cells]
    assert {(train.betas, train.ema_decay, train.weight_decay, train.max_grad_norm, train.warmup) for train in trains} == {
        ((0.9, 0.95), 0.9, 1e-4, 1.0, 0)
    }


def flat(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{prefix}.{name}".strip(".")).items()}
