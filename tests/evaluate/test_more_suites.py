"""The suites "geneval" and "prompts", and the verdict of a comparison."""

import json
import math
from dataclasses import replace

import pytest
import torch

from flowalign.config import ConfigError
from flowalign.core.randomness import generator
from flowalign.evaluate.geneval_suite import GenEvalSuite
from flowalign.evaluate.prompt_suite import PromptSuite
from flowalign.evaluate.records import Evaluation, Record, compare, read_evaluation, table
from flowalign.evaluate.statistics import paired_difference
from flowalign.evaluate.suites import run_suite, suite
from flowalign.evaluate.verdicts import verdict
from flowalign.evaluation_report import write_evaluation
from flowalign.rewards import jpeg_size
from flowalign.rewards.geneval_prompts import official
from flowalign.rewards.geneval_rules import Found, judge
from flowalign.suite_options import suite_options, write_geneval_prompts
from tests.evaluate.fakes import random_images


class Painter:
    """Finds in an image exactly what its prompt asks for, where the first pixel is bright enough."""

    detector_name, clip_name = "painter@00000000", "namer@11111111"

    def verdicts(self, images, metadata):
        found = []
        for image, record in zip(images, metadata, strict=True):
            boxes = {"left of": (0, 0, 1, 1), "right of": (9, 0, 10, 1), "above": (5, -9, 6, -8), "below": (5, 9, 6, 10)}
            objects = {
                clause["class"]: [Found(box=boxes.get(clause.get("position", [""])[0], (5, 0, 6, 1)), color=clause.get("color"))]
                * clause["count"]
                for clause in record["include"]
            }
            found.append(judge(record, objects if float(image[0, 0, 0]) > 0.3 else {}))
        return found


def test_geneval_scores_one_for_a_perfect_model_on_all_official_prompts():
    chosen = suite("geneval", judged_by=Painter(), images_per_prompt=1)
    assert chosen.name == "geneval, detector painter@00000000, colors namer@11111111"
    assert [prompt.text for prompt in chosen.prompts()] == [record["prompt"] for record in official()]
    done = run_suite(chosen, lambda prompts, seeds: torch.ones(len(prompts), 3, 8, 8))
    for measure in ("official", "strict", "graded", "graded_flow_grpo"):
        assert done.scores(measure).overall.mean == 1
    assert done.summary()["num_prompts"]["two_object"] == 99


def test_macro_is_over_tags_and_micro_over_images(tmp_path):
    chosen = GenEvalSuite(judged_by=Painter(), images_per_prompt=2)
    done = run_suite(chosen, random_images)
    scores = done.scores("official")
    passed = [(record.tag, record.scores["official"]) for record in done.records]
    tags = dict.fromkeys(tag for tag, _ in passed)
    means = [sum(value for tag, value in passed if tag == name) / sum(tag == name for tag, _ in passed) for name in tags]
    assert scores.overall.mean == pytest.approx(sum(means) / 6)
    assert scores.micro.mean == pytest.approx(sum(value for _, value in passed) / len(passed))
    done.write(tmp_path / "records.jsonl")
    assert read_evaluation(tmp_path / "records.jsonl").records == done.records
    failed = next(record for record in done.records if not record.strict)
    assert failed.reason.startswith("expected ")


def test_part_of_the_prompts_and_other_splits_have_other_names():
    names = {
        GenEvalSuite(judged_by=Painter(), split=split, num_prompts=num).name
        for split, num in (("official", None), ("official", 60), ("train", 60), ("unseen", 60), ("unseen", 61))
    }
    assert len(names) == 5
    part = GenEvalSuite(judged_by=Painter(), num_prompts=60).prompts()
    assert [sum(prompt.tag == tag for prompt in part) for tag in ("single_object", "color_attr")] == [10, 10]
    with pytest.raises(ValueError, match="needed 1 to 553"):
        GenEvalSuite(judged_by=Painter(), num_prompts=554).prompts()


def prompt_suite(**options):
    records = [{"prompt": f"{tag} {i}", "tag": tag} for tag in ("x", "y") for i in range(4)]

    def score(images, prompts, metadata):
        bright = images.double().mean((1, 2, 3))
        odd = torch.tensor([float("nan") if prompt.endswith("3") else len(prompt) for prompt in prompts], dtype=torch.float64)
        return {"bright": bright, "judge": odd}

    return PromptSuite(title="mine", records=records, score=score, **options)


def test_every_reward_is_a_measure_and_what_is_not_computed_is_left_out_and_counted():
    done = run_suite(prompt_suite(images_per_prompt=2), random_images)
    assert done.measures() == ("bright", "judge")
    assert done.scores("judge").overall.mean == 3
    summary = done.summary()
    assert summary["num_invalid"] == {"judge": 4}
    assert sum(summary["num_images"].values()) == 16
    assert "strict" not in summary
    with pytest.raises(ValueError, match="no image has a score 'strict'; there are bright, judge"):
        done.scores("strict")
    assert "macro mean" in table(done, measure="judge")


def test_two_models_are_compared_on_what_both_have():
    base = run_suite(prompt_suite(images_per_prompt=2), random_images)
    tuned = run_suite(prompt_suite(images_per_prompt=2), lambda prompts, seeds: random_images(prompts, seeds) * 0.5)
    found = compare(base, tuned)
    assert set(found) == {"bright", "judge"}
    assert found["bright"].overall.mean == pytest.approx(-base.scores("bright").overall.mean / 2)
    assert sum(found["judge"].num_images.values()) == 12


def test_the_verdict_says_what_is_shown_and_how_many_images_more_would_need():
    noise = torch.randn(2, 200, dtype=torch.float64, generator=generator(0))
    ids, tags = list(range(200)), ["a"] * 200
    better = paired_difference(noise[0], noise[0] + 0.3 + 0.1 * noise[1], ids, tags)
    assert verdict(better, resolution=0.02).startswith("better: +0.3")
    assert verdict(paired_difference(noise[0] + 0.3 + 0.1 * noise[1], noise[0], ids, tags), resolution=0.02).startswith("worse: -0.3")
    same = paired_difference(noise[0], noise[1], ids, tags)
    half = (same.overall.high - same.overall.low) / 2
    few = paired_difference([0.0, 0.1], [0.5, 0.7], [0, 1], ["a", "a"])
    assert few.overall.low > 0
    assert verdict(few, resolution=0.02).startswith("undecided: +0.550")
    assert "(too few prompts)" in verdict(few, resolution=0.02)
    said = verdict(same, resolution=half / 2)
    assert said.startswith("undecided")
    assert "needs about 800 " in said or "needs about 801 " in said
    assert "allows no interval" in verdict(paired_difference([0.0], [1.0], [0], ["a"]), resolution=0.1)
    with pytest.raises(ValueError, match="resolution: got 0"):
        verdict(same, resolution=0)


def test_the_shapes_suite_measures_rewards_besides():
    options = suite_options("shapes", 12, {"reward": ["jpeg_size", "tests.evaluate.test_more_suites.skipping"]})
    chosen = suite("shapes", num_prompts=12, images_per_prompt=2, **options)
    images = torch.rand(24, 3, 32, 32, generator=generator("shapes and rewards"))
    found = run_suite(chosen, lambda texts, seeds: images[: len(texts)], batch_size=24)
    assert found.measures() == ("strict", "graded", "jpeg_size", "skipping")
    expected = jpeg_size.Config().build()(images, [""] * 24, [{}] * 24).tolist()
    assert [record.scores["jpeg_size"] for record in found.records] == pytest.approx(expected)
    assert [record.scores["skipping"] for record in found.records[:2]] == [None, pytest.approx(float(images[1].mean()))]
    assert run_suite(suite("shapes", num_prompts=12, images_per_prompt=2), lambda texts, seeds: images[: len(texts)]).measures() == (
        "strict",
        "graded",
    )


def skipping(images):
    """Cannot say anything of the first image."""
    return torch.cat([torch.tensor([math.nan]), images[1:].mean((1, 2, 3))])


def test_misspelt_and_misplaced_options_are_answered(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'geneval'"):
        suite("genevall")
    with pytest.raises(ConfigError, match="--detector: is an option of suite geneval, not of 'shapes'"):
        suite_options("shapes", None, {"detector": "x"})
    with pytest.raises(ConfigError, match="--reward: is needed by suite prompts"):
        suite_options("prompts", None, {"prompts": tmp_path / "p.txt", "reward": None})
    with pytest.raises(ConfigError, match="--split: got 'test'"):
        suite_options("geneval", None, {"split": "test"})
    with pytest.raises(FileNotFoundError, match="flowalign geneval convert"):
        suite_options("geneval", None, {"detector": "no/such"})
    path = tmp_path / "p.txt"
    path.write_text("a dog\na cat\na dog\n")
    with pytest.raises(ConfigError, match=r"p.txt, line 3: the prompt stands at .*line 1 already"):
        suite_options("prompts", None, {"prompts": path, "reward": ["jpeg_size"]})
    path.write_text("a dog\n")
    with pytest.raises(ConfigError, match=r"line 1: reward 'ocr' cannot score 'a dog': .* wants no text"):
        pytest.importorskip("rapidocr")
        suite_options("prompts", None, {"prompts": path, "reward": ["ocr"]})
    with pytest.raises(ConfigError, match=r"--reward.reward.type: unknown type 'jpeg_sise' of rewards: did you mean 'jpeg_size'"):
        suite_options("prompts", None, {"prompts": path, "reward": ["jpeg_sise"]})


def test_the_command_scores_a_prompt_file_and_writes_the_verdict(tmp_path, capsys):
    from flowalign.cli import main

    path = tmp_path / "mine.txt"
    path.write_text("a photo of a red ring\na photo of a circle\na photo of two stars\n")
    arguments = ["evaluate", "shapes", "--suite", "prompts", "--prompts", str(path), "--reward", "{type: jpeg_size, want: large}"]
    main([*arguments, "--images-per-prompt", "2", "--num-steps", "2", "--against", "shapes", "--output", str(tmp_path / "out")])
    assert "jpeg_size on prompts/mine, 6 images" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["paired_difference"]["jpeg_size"]["mean"] == 0
    assert summary["verdict"]["jpeg_size"].startswith("undecided: +0.000")
    assert summary["tuned"]["jpeg_size"]["overall"]["mean"] > 0.5


def test_the_command_writes_prompt_files(tmp_path, capsys):
    from flowalign.cli import main

    with pytest.raises(SystemExit):
        main(["geneval", "prompts", "--output", str(tmp_path / "all.txt")])
    assert "needed a name that ends in .jsonl" in capsys.readouterr().err
    main(["geneval", "prompts", "--output", str(tmp_path / "all.jsonl")])
    assert "553 prompts" in capsys.readouterr().out
    main(["geneval", "prompts", "--split", "unseen", "--num", "20", "--seed", "3", "--output", str(tmp_path / "few.jsonl")])
    assert len((tmp_path / "few.jsonl").read_text().splitlines()) == 20
    with pytest.raises(ConfigError, match="--split: got 'offical', needed official, train, unseen or all"):
        write_geneval_prompts(tmp_path / "no.jsonl", "offical", num=20, seed=3)
    assert not (tmp_path / "no.jsonl").exists()


def test_genevals_page_is_headed_by_its_own_measure(tmp_path):
    """Images that GenEval holds for right are framed as right, whatever the stricter variant says."""
    records = tuple(
        Record(id=i, prompt=f"p{i}", tag="ab"[i % 2], k=k, strict=False, graded=0.5, scores={"official": 1.0})
        for i in range(4)
        for k in range(2)
    )
    images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    found = Evaluation(suite="geneval", seed=0, records=records, images=images, headline=GenEvalSuite(judged_by=Painter()).headline)
    assert found.measures() == ("official", "strict", "graded")
    assert all(found.passed(record) for record in records)
    assert not any(replace(found, headline="strict").passed(record) for record in records)
    page = write_evaluation(tmp_path / "page.html", found, found, names=("one", "other"), notes=[], settings="").read_text()
    assert "Official score" in page
    assert "Strict score" not in page
