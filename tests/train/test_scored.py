"""What a run records of single images, and what its report shows of it."""

import re
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from flowalign import run, scored, shapes
from flowalign.evaluate.records import read_evaluation
from flowalign.run_config import load_config
from flowalign.run_report import report_runs
from flowalign.shapes.verifier import CLAUSES
from flowalign.train.journal import read_log
from flowalign.train.settings import TrainConfig

TRAIN = {"groups": 3, "group_size": 4, "micro_batch_size": 12, "learning_rate": 1e-2, "sample_every": 6}


@pytest.fixture
def trained(write_config):
    path = write_config(steps=12, train=TRAIN)
    run.train(str(path))
    return load_config(str(path)).output


def test_the_first_steps_and_those_up_to_each_grid_are_due():
    config = TrainConfig(sample_every=20)
    assert [done for done in range(1, 48) if scored.is_due(done, 47, config)] == [
        *range(1, 6),
        *range(16, 21),
        *range(36, 41),
        *range(43, 48),
    ]
    assert not any(scored.is_due(done, 47, replace(config, sample_every=0)) for done in range(1, 48))


def test_records_are_the_scores_that_were_logged_and_the_report_tells_them(trained):
    lines = read_log(trained / "log.jsonl")
    found = {step: read_evaluation(path) for step, path in scored._steps(trained / scored.FOLDER).items()}
    assert sorted(found) == [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]
    for step, one in found.items():
        assert len(one.records) == 12
        for name, mean in lines[step - 1]["reward"].items():
            assert sum(record.scores[name] for record in one.records) / 12 == pytest.approx(mean)
        assert all(set(record.clauses) <= set(CLAUSES) and record.clauses for record in one.records)
    windows = scored.read(trained)
    assert [list(window.steps) for window in windows.values()] == [[1, 2, 3, 4, 5], [8, 9, 10, 11, 12]]
    last = windows["last"]
    assert last.found.records == tuple(record for step in range(8, 13) for record in found[step].records)
    text = report_runs([trained]).read_text()
    for wanted in ("Shapes by kind of prompt", "Brightness by kind of prompt", "Distribution of shapes", "Worst images", "Best images"):
        assert wanted.lower() in text.lower()
    score = last.found.scores("brightness")
    assert str(score.overall) in text
    assert all(str(interval) in text for interval in score.per_tag.values())
    values = {}
    for record in last.found.records:
        values.setdefault(record.id, []).append(record.scores["shapes"])
    for title, order in (
        ("Worst images", sorted(map(min, values.values()))),
        ("Best images", sorted(map(max, values.values()), reverse=True)),
    ):
        shown = re.findall(r"shapes ([\d.e-]+)</span>", text.split(title)[1].split("</section>")[0])
        assert [float(value) for value in shown] == pytest.approx(order[: scored.MOST], abs=1e-3)


def test_pictures_are_those_of_their_records(write_config, tmp_path):
    path = write_config(train=TRAIN)
    trainer = run.build_trainer(load_config(str(path)), Accelerator())
    found = trainer.collect(0)
    scored.keep(tmp_path, 1, found, seed=0)
    window = scored.read(tmp_path)["last"]
    assert 6 >= len(window.pictures) >= 3
    for row, data in window.pictures.items():
        (tmp_path / "one.png").write_bytes(data)
        picture = Image.open(tmp_path / "one.png")
        assert torch.equal(pil_to_tensor(picture), (found.images[row] * 255).round().to(torch.uint8))
        assert window.found.records[row].prompt == found.prompts[row]
    verdict = shapes.verify(found.images, list(found.metadata))
    for record, holds, asked in zip(window.found.records, verdict.clauses.tolist(), verdict.clauses_valid.tolist(), strict=True):
        assert record.clauses == {name: held for name, held, valid in zip(CLAUSES, holds, asked, strict=True) if valid}


def test_a_run_that_was_interrupted_records_what_a_whole_one_does(write_config, trained):
    path = write_config("parts", steps=12, train=TRAIN)
    run.train(str(path), ["--steps", "7"])
    run.train(str(path))
    folder = load_config(str(path)).output
    whole, parts = ({file.name: file.read_bytes() for file in (place / scored.FOLDER).iterdir()} for place in (trained, folder))
    assert parts == whole


def test_a_student_and_a_run_without_grids(write_config):
    distil = {"type": "dmd2", "num_pairs": 16, "critic_updates": 1, "least_steps": 0, "discriminator": {"taps": [0.5], "width": 8}}
    train = {"groups": 2, "group_size": 4, "micro_batch_size": 8}
    path = write_config("student", steps=1, algorithm=distil, train=train)
    run.train(str(path))
    (line,) = read_log(load_config(str(path)).output / "log.jsonl")
    records = scored.read(load_config(str(path)).output)["last"].found.records
    assert sum(record.scores["brightness"] for record in records) / len(records) == pytest.approx(line["reward"]["brightness"])
    path = write_config("bare", steps=1, train={**train, "sample_every": 0})
    run.train(str(path))
    folder = load_config(str(path)).output
    assert not (folder / scored.FOLDER).exists()
    assert "by kind of prompt" not in report_runs([folder]).read_text()
