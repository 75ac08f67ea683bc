"""Distillation through the whole loop: roles on one base, critics, counts, resuming, ranks, and a pipeline that samples in one step."""

import math
import signal
import warnings

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from flowalign.algorithms import f_distill
from flowalign.config import ConfigError
from flowalign.core.algorithm import NeverReady, Update
from flowalign.core.ratios import identity
from flowalign.evaluate import monitors
from flowalign.evaluation import evaluate
from flowalign.generate import open_model
from flowalign.lcsc import lcsc
from flowalign.run import build_trainer, run_training
from flowalign.run_config import load_config
from flowalign.train.checkpoint import load_newest, present
from flowalign.train.fit import Alarmed
from flowalign.train.journal import read_log
from tests.train.launch import end_at, on_one_and_two_processes

SMALL = {"groups": 2, "group_size": 2, "micro_batch_size": 4, "learning_rate": 1e-2}
F_DISTILL = {
    "type": "f_distill",
    "num_pairs": 12,
    "critic_updates": 2,
    "least_steps": 1,
    "adversarial_weight": 0.1,
    "weights": {"num_bins": 1},
    "discriminator": {"taps": [0.5], "width": 8},
}


def settings(write_config, name="run", **changes):
    algorithm = {**F_DISTILL, **changes.pop("algorithm", {})}
    return write_config(name, **{"train": SMALL, "rewards": [], "algorithm": algorithm, **changes})


def build(write_config, **changes):
    config = load_config(str(settings(write_config, **changes)))
    return build_trainer(config, Accelerator())


def weights_of(built, role):
    return {name: value.detach().clone() for name, value in built.pipeline.roles.parameters(role).items()}


def moved(built, before):
    return {role: any(not torch.equal(old[name], weights_of(built, role)[name]) for name in old) for role, old in before.items()}


def test_a_step_moves_the_critics_then_the_student_and_evaluates_what_it_must(write_config):
    built = build(write_config, algorithm={"warmup_steps": 1, "teacher_steps": 3})
    before = {role: weights_of(built, role) for role in ("current", "fake")}
    lines = [built.step(step) for step in range(4)]
    counts = [{key: value for key, value in line["evaluations"].items() if key not in ("total", "rows_per_evaluation")} for line in lines]
    batch = 4
    assert counts[0] == {"teacher": 3 * 12, "shown": batch, "train": 3 * batch}  # the warm-up: three updates of the student
    # Of each critic update: the student without gradient, the fake score with, the base up to its tap on what is real and what is not.
    critics = {"current": 2 * batch, "train": 2 * batch, "taps": 2 * 2 * batch}
    # Held back: student, teacher and fake score once, without gradient, which calibrates the ratio.
    assert counts[1] == {**critics, "current": 3 * batch, "reference": batch, "fake": batch, "shown": batch}
    # Of a student's update: one pass with gradient, the teacher's (which the discriminator reads too) and the fake score's.
    assert counts[2] == {**critics, "train": 3 * batch, "reference": batch, "fake": batch, "shown": batch}
    assert counts[3] == counts[2]
    assert "pair_error" in lines[0]["metrics"]
    assert "push" not in lines[1]["metrics"]
    assert {"push", "adversarial", "fake/loss", "discriminator/accuracy", "ratio/bin_0", "ratio/effective_share"} <= set(
        lines[2]["metrics"]
    )
    assert lines[1]["grad_norm"] == 0
    assert lines[2]["grad_norm"] > 0
    assert moved(built, before) == {"current": True, "fake": True}


def test_the_warm_up_has_a_learning_rate_of_its_own_which_falls_to_the_usual_one(write_config):
    built = build(write_config, algorithm={"warmup_steps": 2, "least_steps": 1, "warmup_learning_rate": 0.5})
    rates = []
    for step in range(4):
        built.step(step)
        rates.append(built.cast.optimizer.param_groups[0]["lr"])
    usual, num = SMALL["learning_rate"], 2 * built.algorithm.num_updates
    # After the last update of each step, the student being held back in the third.
    falling = [0.5 + (usual - 0.5) * (num // 2 * (step + 1) - 1) / num for step in range(2)]
    assert rates == pytest.approx([*falling, falling[1], usual])


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_the_teacher_is_the_base_bit_for_bit_and_the_fake_score_begins_as_it(write_config, model, lora):
    built = build(write_config, pipeline={"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": lora})
    x, sigma = torch.randn(2, *built.pipeline.event_shape), torch.tensor([0.3, 0.8])
    cond = built.pipeline.encode(["a red ring", "a blue disk"])

    def velocity(role):
        with torch.no_grad():
            return built.pipeline.velocity(x, sigma, cond, role)

    base = velocity("reference")
    assert torch.equal(velocity("fake"), base)
    for step in range(3):
        built.step(step)
    assert torch.equal(velocity("reference"), base)
    assert not torch.equal(velocity("fake"), base)
    assert not torch.equal(velocity("current"), velocity("fake"))


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_each_players_gradient_reaches_that_player_alone(write_config, model, lora):
    pipeline = {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": lora}
    built = build(write_config, pipeline=pipeline)
    found = built.collect(0)
    velocity, algorithm = found.velocity, built.algorithm

    def touched():
        players = {name: player.parameters for name, player in built.cast.players.items()}
        hit = {name for name, parameters in players.items() if any(p.grad is not None and bool(p.grad.any()) for p in parameters)}
        for parameters in players.values():
            for parameter in parameters:
                parameter.grad = None
        return hit

    with torch.no_grad():
        rows = algorithm.look(algorithm.rows(found.experience, Update(seed=0, step=0, index=0)), velocity)
    for player in ("fake", "discriminator"):
        with built.pipeline.roles.use(player) if player == "fake" else torch.enable_grad():
            algorithm.loss(player, rows, velocity).value.sum().backward()
        assert touched() == {player}
    torch.nn.init.normal_(built.cast.heads["discriminator"].bare.pooled[0].weight)  # at first it says 0 of everything
    for kept in (True, False):
        with torch.set_grad_enabled(kept):
            rows = algorithm.look(algorithm.rows(found.experience, Update(seed=0, step=0, index=2)), velocity)
        (rows,), _, _ = algorithm.weigh([rows], built.cast.state, identity)
        algorithm.loss("current", rows, velocity).value.sum().backward()
        assert touched() == {"current"}
    assert not any(p.grad is not None and bool(p.grad.any()) for p in built.pipeline.denoiser.parameters())


def test_the_discriminator_reads_the_base_on_latents_that_carry_gradient(write_config):
    """The adversarial part of the student's gradient against central differences."""
    built = build(write_config)
    torch.nn.init.normal_(built.cast.heads["discriminator"].bare.pooled[0].weight)
    velocity = built.collect(0).velocity
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *built.pipeline.event_shape, generator=generator)
    direction = torch.randn(x.shape, generator=generator)
    sigma, sample = torch.tensor([0.4]), torch.tensor([0])

    def logit(at):
        return velocity(at, sigma, sample, "discriminator").sum()

    x.requires_grad_()
    (slope,) = torch.autograd.grad(logit(x), x)
    step = 1e-2
    with torch.no_grad():
        expected = (logit(x + step * direction) - logit(x - step * direction)) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(float(expected), rel=2e-2, abs=1e-4)
    assert float(expected) != 0


def test_micro_batches_change_nothing(write_config):
    steps = []
    for size in (4, 2):
        built = build(write_config, name=f"micro_{size}", train={**SMALL, "micro_batch_size": size}, algorithm={"least_steps": 1})
        built.step(0)
        line = built.step(1)
        steps.append((line["metrics"], line["grad_norm"], weights_of(built, "current")))
    assert steps[0][1] == pytest.approx(steps[1][1], rel=1e-4)
    assert steps[0][1] > 0
    # Adam makes whole steps of gradients that are rounding.
    for name, value in steps[0][2].items():
        assert (value - steps[1][2][name]).abs().mean() < 0.02 * SMALL["learning_rate"], name
    for name, value in steps[0][0].items():
        assert steps[1][0][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_gradient_checkpointing_changes_no_players_gradient(write_config, model):
    norms = []
    for flag in (False, True):
        pipeline = {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "gradient_checkpointing": flag}
        built = build(write_config, name=f"checkpointing_{flag}", pipeline=pipeline, algorithm={"least_steps": 1})
        lines = [built.step(step) for step in range(3)]
        names = ("fake/grad_norm", "discriminator/grad_norm")
        norms.append([line["grad_norm"] for line in lines] + [line["metrics"][name] for line in lines for name in names])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_dmd2_is_f_distill_with_reverse_kl(write_config):
    found = []
    for name, options in (("f_distill", {"weights": {"divergence": "reverse_kl", "num_bins": 1}}), ("dmd2", {})):
        algorithm = {key: value for key, value in F_DISTILL.items() if key != "weights"} | {"type": name, "least_steps": 1, **options}
        path = write_config(name, train=SMALL, rewards=[], algorithm=algorithm, steps=4)
        built = run_training(load_config(str(path)))
        log = read_log(load_config(str(path)).output / "log.jsonl")
        found.append((weights_of(built, "current"), [line["metrics"]["loss"] for line in log if "loss" in line["metrics"]]))
    (one, losses), (two, others) = found
    assert len(losses) == 3
    assert losses == pytest.approx(others, rel=1e-6)
    assert all(torch.allclose(one[name], two[name], rtol=1e-6, atol=1e-7) for name in one)


def test_a_resumed_run_ends_with_the_same_bits(write_config, capsys):
    """Stopped while the critics learn alone, and again afterwards."""
    whole = settings(write_config, "whole", steps=5, algorithm={"warmup_steps": 1, "least_steps": 2})
    run_training(load_config(str(whole)))
    parts = settings(write_config, "parts", steps=5, algorithm={"warmup_steps": 1, "least_steps": 2})
    with pytest.raises(ValueError, match=r"the student never moved after its warm-up in 2 steps.*more --steps go on"):
        run_training(load_config(str(parts), ["--steps", "2"]))
    for steps in ("4", "5"):
        run_training(load_config(str(parts), ["--steps", steps]))
    folders = [load_config(str(path)).output for path in (whole, parts)]
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    assert [line["metrics"] for line in logs[0]] == [line["metrics"] for line in logs[1]]
    files = [load_file(folder / "weights" / "pytorch_lora_weights.safetensors") for folder in folders]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert "push" in logs[0][-1]["metrics"]
    with pytest.raises(ConfigError, match="divergence"):
        run_training(load_config(str(parts), ["--steps", "6", "--algorithm.weights.divergence", "forward_kl"]))


def test_a_run_that_is_killed_between_its_critics_updates_resumes_to_the_same_bits(write_config):
    """Once while the critics learn alone, once while the student learns too; half of each step's critics had moved."""
    same = {"steps": 5, "algorithm": {"least_steps": 2}}
    whole, parts = settings(write_config, "whole", **same), settings(write_config, "killed", **same)

    for step, update in ((1, 0), (3, 1)):
        ended = end_at(parts, "discriminator", step, update)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert [line["step"] for line in read_log(load_config(str(parts)).output / "log.jsonl")] == list(range(step))
    for path in (parts, whole):
        run_training(load_config(str(path)))
    folders = [load_config(str(path)).output for path in (whole, parts)]
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    assert [line["metrics"] for line in logs[0]] == [line["metrics"] for line in logs[1]]
    states = [load_newest(folder / "checkpoints")[1] for folder in folders]
    assert flat(states[0]).keys() == flat(states[1]).keys()
    for name, value in flat(states[0]).items():
        other = flat(states[1])[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert "push" in logs[0][-1]["metrics"]


def flat(state, prefix=""):
    if not isinstance(state, dict | list):
        return {prefix: state}
    inner = state.items() if isinstance(state, dict) else enumerate(state)
    return {key: value for name, part in inner for key, value in flat(part, f"{prefix}/{name}").items()}


def test_samples_of_the_teacher_that_were_cut_off_are_made_again(write_config):
    built = build(write_config)
    built.collector.prepare()
    (path,) = built.collector.folder.glob("*.safetensors")
    whole = load_file(path)["x0"].clone()  # off the file
    path.write_bytes(path.read_bytes()[:-50])
    again = build(write_config)
    again.collector.prepare()
    assert torch.equal(load_file(path)["x0"], whole)


def test_two_processes_distil_like_one(write_config):
    # A discriminator that says something at once: ratios of 1 would be the same however they are averaged.
    judge = {"taps": [0.5], "width": 8, "learning_rate": 0.3}
    algorithm = {**F_DISTILL, "least_steps": 1, "warmup_steps": 1, "discriminator": judge, "weights": {"num_bins": 0}}
    folders = on_one_and_two_processes(write_config, steps=3, train=SMALL, rewards=[], algorithm=algorithm)
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    assert logs[0][2]["metrics"]["ratio/effective_share"] < 0.99
    for one, two in zip(*logs, strict=True):
        assert one["evaluations"] == two["evaluations"]
        assert one["metrics"].keys() == two["metrics"].keys()
        for name, value in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(value, rel=2e-2, abs=1e-3), name
    assert logs[0][0]["metrics"]["pair_error"] == pytest.approx(logs[1][0]["metrics"]["pair_error"], rel=1e-4)


def test_an_alarm_stops_a_distillation_and_costs_no_weights(write_config, monkeypatch):
    def alarms(lines, rewards):
        return [monitors.Alarm(monitor="diversity", step=1, text="diversity falls")] if len(lines) > 1 else []

    monkeypatch.setattr(monitors, "student_alarms", alarms)
    path = settings(write_config, steps=5, algorithm={"warmup_steps": 5}, train={**SMALL, "stop_on_alarm": True})
    with pytest.raises(Alarmed, match="stopped after step 2 of 5: diversity falls"):
        run_training(load_config(str(path)))
    output = load_config(str(path)).output
    assert len(read_log(output / "log.jsonl")) == 2
    assert (output / "weights").is_dir()


def test_critics_that_are_never_ready_stop_the_run_with_its_warm_up_saved(write_config, monkeypatch):
    monkeypatch.setattr(f_distill, "is_calibrated", lambda calibration: False)
    algorithm = {"warmup_steps": 3, "least_steps": 1, "patience": 2}
    path = settings(write_config, steps=12, algorithm=algorithm, train={**SMALL, "checkpoint_every": 10})
    with pytest.raises(NeverReady, match="go on in another folder"):
        run_training(load_config(str(path)))
    output = load_config(str(path)).output
    done = max(present(output / "checkpoints"))
    assert done == len(read_log(output / "log.jsonl")) >= 3
    monkeypatch.undo()
    more = load_config(str(path), ["--algorithm.patience", "9", "--output", str(output) + "_on"])
    run_training(more, source=output)
    assert len(read_log(more.output / "log.jsonl")) == 12


def test_metrics_are_refused_for_they_would_not_be_measured(write_config):
    with pytest.raises(ConfigError, match="metrics: a distillation measures its rewards"):
        build(write_config, metrics=["novelty"])


def test_a_student_samples_in_one_step_from_its_file(write_config):
    path = settings(write_config, steps=3, algorithm={"least_steps": 1})
    built = run_training(load_config(str(path)))
    fresh = load_config(str(path)).pipeline.build()
    fresh.load_lora(load_config(str(path)).output / "weights")
    noise = torch.randn(2, *fresh.event_shape, generator=torch.Generator().manual_seed(0))
    prompt = "a photo of a red ring"
    images = fresh.pipe(
        prompt, num_images_per_prompt=2, latents=noise, num_inference_steps=1, guidance_scale=1.0, max_sequence_length=16, output_type="pt"
    ).images
    x0 = noise - built.pipeline.velocity(noise, torch.ones(2), built.pipeline.encode([prompt] * 2), "current")
    torch.testing.assert_close(images, built.pipeline.decode(x0.detach()), atol=1e-4, rtol=0)


def test_a_student_of_all_weights_is_compared_with_its_teacher_as_that_is_sampled(write_config, model, capsys):
    pipeline = {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": None}
    path = settings(write_config, steps=2, algorithm={"warmup_steps": 2}, pipeline=pipeline)
    run_training(load_config(str(path)))
    weights = load_config(str(path)).output / "weights"
    evaluate(str(weights), against=str(model), num_prompts=6, images_per_prompt=1)
    assert "1 steps against 4 of the other" in capsys.readouterr().out
    evaluate(str(model), against=str(weights), num_prompts=6, images_per_prompt=1, num_steps=4)
    assert "4 steps against 1 of the other" in capsys.readouterr().out


def test_checkpoints_of_a_student_are_combined_by_what_it_makes_in_its_own_steps(write_config):
    rewards = [{"reward": {"type": "shapes", "strict": 0.0}}]
    path = settings(write_config, steps=3, algorithm={"warmup_steps": 3}, rewards=rewards, train={**SMALL, "keep_checkpoints": 3})
    run_training(load_config(str(path)))
    output = load_config(str(path)).output
    lcsc(output, budget=3, num_prompts=4)
    assert '"denoising_steps": 1' in (output / "lcsc" / "search.jsonl").read_text()


def test_checkpoints_of_a_run_without_trained_rewards_need_something_to_be_chosen_by(write_config):
    path = settings(write_config, steps=3, algorithm={"warmup_steps": 3}, train={**SMALL, "keep_checkpoints": 3})
    run_training(load_config(str(path)))
    output = load_config(str(path)).output
    with pytest.raises(ConfigError, match="the run has no rewards, .*--reward clip_score"):
        lcsc(output, budget=3, num_prompts=4)
    assert lcsc(output, budget=3, num_prompts=4, reward=["jpeg_size"])


def test_the_best_student_is_sampled_in_its_own_steps(write_config, model):
    rewards = [{"reward": {"type": "shapes", "strict": 0.0}, "weight": 0}]
    train = {**SMALL, "keep_best_by": "diversity"}
    path = settings(write_config, steps=6, algorithm={"warmup_steps": 6}, rewards=rewards, train=train)
    run_training(load_config(str(path)))
    output = load_config(str(path)).output
    for place in ("weights", "best_weights"):
        assert open_model(str(model), output / place)[1].num_steps == 1


def test_a_guided_teacher_is_asked_with_and_without_guidance(write_config):
    built = build(write_config, algorithm={"guidance_scale": 3.0, "least_steps": 1})
    assert built.teacher.rows_per_evaluation == 2
    assert built.pipeline.rows_per_evaluation == 1
    line = built.step(0)
    # Its samples take two rows each, one look at the student's batch one besides the reference's: the specification's cond and uncond.
    assert line["evaluations"]["teacher"] == 2 * 12 * 4 + 4
    counts = built.step(1)["evaluations"]
    assert (counts["teacher"], counts["reference"]) == (4, 4)
    assert math.isfinite(built.step(2)["metrics"]["loss"])


def test_the_guided_half_beside_the_references_pass_is_the_guided_teacher(write_config):
    built = build(write_config, algorithm={"guidance_scale": 3.0, "least_steps": 1})
    networks = built.collect(0).velocity
    x, sigma, sample = torch.randn(4, *built.pipeline.event_shape), torch.tensor([0.2, 0.5, 0.8, 0.9]), torch.tensor([0, 3, 5, 11])
    with torch.no_grad():
        plain = networks(x, sigma, sample, "reference")
        guided = networks(x, sigma, sample, "teacher")
        whole = built.teacher.velocity(x, sigma, networks.teacher[1].take(sample), "reference")
    torch.testing.assert_close(guided, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, whole, rtol=1e-3)


def test_without_a_discriminator_the_teachers_pass_is_the_references_and_carries_no_gradient(write_config):
    algorithm = {"type": "dmd2", "num_pairs": 12, "critic_updates": 2, "least_steps": 0, "adversarial_weight": 0.0}
    built = build_trainer(load_config(str(write_config(train=SMALL, rewards=[], algorithm=algorithm))), Accelerator())
    batch = 4
    counts = built.step(0)["evaluations"]
    assert (counts["train"], counts["reference"], counts["fake"], counts["current"]) == (3 * batch, batch, batch, 2 * batch)
    assert "taps" not in counts


def test_what_is_measured_is_the_version_that_is_saved(write_config):
    """With an average of the weights the images that choose the best step are the average's."""
    built = build(write_config, train={**SMALL, "ema_decay": 0.9}, algorithm={"warmup_steps": 3})
    assert built.result == built.collector.shown == "average"
    for step in range(2):
        built.step(step)
    latents = built.collect(2).latents
    live = build(write_config, train=SMALL)
    assert live.collector.shown == "current"
    built.collector.shown = "current"
    assert not torch.equal(built.collect(2).latents, latents)


def test_a_teacher_that_cannot_be_guided_is_refused(write_config, monkeypatch):
    from flowalign.pipelines.sd3 import Config as SD3

    monkeypatch.setattr(SD3, "guided", lambda self, scale, pipe: self)  # as a pipeline whose guidance is embedded
    with pytest.raises(ConfigError, match=r"algorithm.guidance_scale: got 3.0, but the pipeline makes no second pass"):
        build(write_config, algorithm={"guidance_scale": 3.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": {"discriminator": {"taps": ["transformer_blocks.77"]}}},
            r"has no module 'transformer_blocks.77'; there are .*transformer_blocks",
        ),
        ({"algorithm": {"num_pairs": 3}}, "num_pairs: 3 pairs are fewer than the 4 of one update"),
        ({"pipeline": {"guidance_scale": 2.0}}, "a student of few steps is not guided"),
    ],
)
def test_what_cannot_be_distilled_is_refused(write_config, model, changes, message):
    pipeline = {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, **changes.pop("pipeline", {})}
    with pytest.raises(ValueError, match=message):
        build(write_config, pipeline=pipeline, **changes)


def test_a_divergence_that_is_not_known_is_refused_where_it_stands(write_config):
    with pytest.raises(ValueError, match=r"algorithm.weights.*jensen_shanon.*jensen_shannon"):
        load_config(str(settings(write_config)), ["--algorithm.weights.divergence", "jensen_shanon"])


def test_ratios_outside_the_clip_are_warned_of_with_the_remedy(write_config):
    built = build(write_config)
    with torch.no_grad():
        built.cast.heads["discriminator"].bare.pooled[0].bias.fill_(-8.0)
    with pytest.warns(UserWarning, match=r"density ratio: most of the batch lies outside .*lower the discriminator's learning rate"):
        line = built.step(0)
    assert line["metrics"]["ratio/clipped"] == 1
    assert line["metrics"]["ratio/log_ratio"] < math.log(0.1)
    said = {str(seen.message) for seen in warned(lambda: [built.step(step) for step in (1, 2)])}
    assert len([text for text in said if text.startswith("density ratio")]) == 1  # the same words: said once a run


def warned(act):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        act()
    return seen


def test_the_penalty_of_a_discriminator_takes_a_third_early_pass(write_config):
    built = build(write_config, algorithm={"discriminator": {"taps": [0.5], "width": 8, "r1": 0.1}})
    assert built.step(0)["evaluations"]["taps"] == 2 * 3 * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_is_not_finite_is_named_and_not_the_critics(write_config, value):
    built = build(write_config, algorithm={"least_steps": 1})
    found = built.collect(0)
    rows = built.algorithm.rows(found.experience, Update(seed=0, step=1, index=built.algorithm.num_updates - 1))

    def velocity(x, sigma, sample, role):
        said = found.velocity(x, sigma, sample, role)
        return torch.full_like(said, value) if role == "reference" else said  # as half precision overflows

    with torch.no_grad():
        rows = built.algorithm.look(rows, velocity)
    with pytest.raises(FloatingPointError, match=r"step 1, the frozen teacher: its output is not finite .*pipeline.dtype"):
        built.updater._check_outputs([rows], 1)


def test_samples_of_a_broken_teacher_are_not_kept(write_config):
    built = build(write_config)
    with torch.no_grad():
        built.pipeline.denoiser.proj_out.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the teacher's samples are not finite"):
        built.collector.prepare()
    assert not list(built.collector.folder.glob("*.safetensors"))


@pytest.mark.parametrize("player", ["fake", "discriminator", "current"])
def test_weights_that_a_step_breaks_name_their_player(write_config, player):
    built = build(write_config)
    with torch.no_grad():
        built.cast.players[player].parameters[0].fill_(math.inf)
    where = "train" if player == "current" else f"algorithm.{player}"
    with pytest.raises(FloatingPointError, match=rf"step 3, player '{player}': the norm of its weights is .*Lower {where}.learning_rate"):
        built.updater.check_weights(3)


def test_no_block_behind_the_last_tap_is_called_for_the_critics(write_config):
    built = build(write_config, algorithm={"discriminator": {"taps": [0.0], "width": 8}})
    found = built.collect(0)
    first, *_, last = built.pipeline.denoiser.transformer_blocks
    called = []
    for name, block in (("first", first), ("last", last)):
        block.register_forward_hook(lambda *_, name=name: called.append(name))
    x = torch.randn(2, *built.pipeline.event_shape)
    with torch.no_grad():
        found.velocity(x, torch.tensor([0.3, 0.6]), torch.tensor([0, 1]), "discriminator")
    assert called == ["first"]
    with torch.no_grad():
        found.velocity(x, torch.tensor([0.3, 0.6]), torch.tensor([0, 1]), "reference")
    assert called[1:] == ["first", "last"]


def test_constant_weights_need_no_second_pass_of_the_student_in_micro_batches(write_config):
    found = []
    for size in (4, 1):
        algorithm = {key: value for key, value in F_DISTILL.items() if key != "weights"} | {"type": "dmd2"}
        path = write_config(f"micro_{size}", train={**SMALL, "micro_batch_size": size}, rewards=[], algorithm=algorithm)
        built = build_trainer(load_config(str(path)), Accelerator())
        held = built.step(0)["evaluations"]
        assert "reference" not in held  # held back, nothing of the student's update is looked at
        line = built.step(1)
        found.append((line, weights_of(built, "current")))
    (one, before), (two, after) = found
    assert one["evaluations"] == two["evaluations"]
    assert two["evaluations"]["train"] == (2 + 1) * 4  # two updates of the fake score, one of the student, each row once
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for name, value in before.items():
        assert (value - after[name]).abs().mean() < 0.02 * SMALL["learning_rate"], name


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_a_student_of_several_steps_walks_to_its_rung_and_finishes_there(write_config, monkeypatch, rung):
    """Backward simulation at rung r: r passes without gradient, one with."""
    monkeypatch.setattr("flowalign.core.distiller.uniform", lambda **_: (rung + 0.5) / 3)
    built = build(write_config, algorithm={"student_steps": 3, "least_steps": 1})
    built.step(0)
    counts = built.step(1)["evaluations"]
    batch = 4
    # Two updates of the critics, in which no pass of the student carries gradient, then its own.
    assert counts["current"] == 2 * (rung + 1) * batch + rung * batch
    assert counts["train"] == (2 + 1) * batch
    assert (counts["reference"], counts["fake"], counts["taps"], counts["shown"]) == (batch, batch, 2 * 2 * batch, 3 * batch)


@pytest.mark.parametrize("player", ["discriminator", "fake", "current"])
def test_a_player_that_is_not_finite_stops_before_anyone_moves_and_is_named(write_config, player):
    built = build(write_config)
    with torch.no_grad():
        built.cast.players[player].parameters[0].fill_(float("nan"))
    before = {role: weights_of(built, role) for role in ("current", "fake")}
    head = [parameter.detach().clone() for parameter in built.cast.heads["discriminator"].parameters]
    with pytest.raises(FloatingPointError, match=f"step 0, player '{player}': .*it was not updated"):
        built.step(0)
    assert not any(
        not torch.equal(old.nan_to_num(), weights_of(built, role)[name].nan_to_num())
        for role in before
        for name, old in before[role].items()
    )
    kept = zip(head, built.cast.heads["discriminator"].parameters, strict=True)
    assert all(torch.equal(old.nan_to_num(), new.detach().nan_to_num()) for old, new in kept)


def test_a_fake_score_that_breaks_after_its_last_update_is_blamed_and_not_the_student(write_config):
    built = build(write_config, algorithm={"least_steps": 1})
    honest = built.algorithm.turns

    class Patched(type(built.algorithm)):
        def turns(self, update, *, ready):
            if update.index == self.config.critic_updates:
                with torch.no_grad():
                    built.cast.players["fake"].parameters[0].fill_(float("nan"))
            return honest(update, ready=ready)

    built.updater.algorithm = Patched(built.algorithm.config)
    with pytest.raises(FloatingPointError, match=r"player 'fake': its output is not finite.*Lower algorithm.fake.learning_rate"):
        built.step(0)
