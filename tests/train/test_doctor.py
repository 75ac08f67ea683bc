"""The doctor: every examination on tiny families, its table and its exit code."""

import pytest
import torch

from flowalign import cli, doctor, generate
from flowalign.pipelines import choose, loaded_back, lora_files, parity
from flowalign.pipelines.parity import CHECKS, Finding
from tests.pipelines.families import build, pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["recording", *CHECKS, "ratio gap", "autoencoder", "LoRA file", "memory", "speed", "sanity run"]


def test_the_whole_doctor_passes_on_the_shapes_model(capsys):
    assert doctor.examine("shapes", num_images=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok", "FAILED"))]
    assert len(lines) == 1 + len(NAMES)
    assert all(line.startswith("ok") for line in lines)


@pytest.mark.parametrize("case", ["flux dev", "sd 1.5", "z_image turbo"])
def test_every_examination_of_a_tiny_family_passes_but_that_of_its_random_autoencoder(case):
    found = list(doctor.examinations(build(case), num_steps=4, num_images=1))
    assert len(found) == len(NAMES)
    assert [finding.check for finding in found if not finding.passed] == ["autoencoder round trip"], found
    told = dict(zip(NAMES, (finding.found for finding in found), strict=True))
    assert float(told["autoencoder"].split()[1]) < doctor.LEAST_PSNR
    assert "needed 20" in told["autoencoder"]
    assert told["images"] == "equal"
    assert "images/s of 4 steps" in told["speed"]
    assert "3 steps of AWM" in told["sanity run"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_that_differs_fails_in_every_precision(dtype, monkeypatch):
    flow = build("sd3", pipe=pipeline("sd3").to(dtype))
    it = parity.subject(flow, num_steps=4)
    assert doctor.ratio_gap(it).passed
    honest = flow.velocity
    monkeypatch.setattr(flow, "velocity", lambda x, *rest: honest(x, *rest) + 0.1 * x.sign())
    assert not doctor.ratio_gap(it).passed


def test_the_timed_update_has_the_optimizers_step_and_moves_nothing(monkeypatch):
    flow = build("sd 1.5")
    before = [value.detach().clone() for value in flow.roles.trainable_parameters()]
    steps, honest = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: steps.append(honest(self, *rest)))
    assert "rows/s of an update with AdamW" in doctor.speed(parity.subject(flow, num_steps=4), 1).found
    assert len(steps) == 2
    assert all(torch.equal(value, old) for value, old in zip(flow.roles.trainable_parameters(), before, strict=True))
    assert all(value.grad is None for value in flow.roles.trainable_parameters())


def test_a_file_that_could_not_be_checked_is_no_success(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(lora_files, "compare_behaviour", full)
    found = doctor.files(parity.subject(build("sd 1.5"), num_steps=4))
    assert not found.passed
    assert "not checked" in found.found


def test_an_examination_that_raises_is_a_failure_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(parity, "CHECKS", {"images": lambda it: {}["processor"]})
    monkeypatch.setattr(doctor, "sanity_run", lambda flow: Finding(check="sanity run", passed=True, found=""))
    flow = build("sd 1.5")

    def spoilt(*args, **options):
        raise RuntimeError("the decoder is broken")

    def full(*args, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(doctor, "autoencoder", spoilt)
    monkeypatch.setattr(doctor, "speed", full)
    found = {finding.check: finding for finding in doctor.examinations(flow, num_steps=4, num_images=1)}
    assert not found["autoencoder round trip"].passed
    assert "the decoder is broken" in found["autoencoder round trip"].found
    assert "use dtype bfloat16" in found["speed"].found
    assert found["images"].found == "KeyError: 'processor'"
    assert found["memory by part"].passed


@pytest.mark.parametrize("broken", ["loading", "recording"])
def test_a_model_that_cannot_even_begin_gets_its_verdict(broken, monkeypatch, capsys):
    class Settings:
        def build(self, device):
            if broken == "loading":
                raise torch.OutOfMemoryError("no room")
            flow = build("sd 1.5")
            flow.pipe.encode_prompt = None
            return flow

    monkeypatch.setattr(choose, "settings_of", lambda model: Settings())
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "somewhere"])
    assert left.value.code == 1
    said = capsys.readouterr().out
    reason = "out of memory (no room); use dtype bfloat16" if broken == "loading" else "TypeError: 'NoneType' object is not callable"
    assert any(line.startswith(f"FAILED  {broken}") and reason in line for line in said.splitlines())
    assert said.count("FAILED") == 1
    assert "a check failed" in said


def test_a_command_that_runs_out_of_memory_says_what_helps(monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

    monkeypatch.setattr(generate, "open_model", full)
    for options in ([], ["--debug"]):
        with pytest.raises(torch.OutOfMemoryError if options else SystemExit) as left:
            cli.main([*options, "sample", "shapes", "a ring"])
    assert left.type is torch.OutOfMemoryError
    said = capsys.readouterr().err
    assert said.startswith(
        "flowalign: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB.). What helps: a smaller --batch-size"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("passed", [True, False])
def test_the_exit_code_says_whether_all_passed(passed, monkeypatch, capsys):
    class Settings:
        def build(self, device):
            return build("sd 1.5")

    finding = Finding(check="images", passed=passed, found="as measured")
    monkeypatch.setattr(choose, "settings_of", lambda model: Settings())
    monkeypatch.setattr(doctor, "examinations", lambda flow, **options: iter([finding]))
    if passed:
        cli.main(["doctor", "somewhere"])
    else:
        with pytest.raises(SystemExit) as left:
            cli.main(["doctor", "somewhere"])
        assert left.value.code == 1
    said = capsys.readouterr().out
    assert ("ok      images" if passed else "FAILED  images") in said
    assert "as measured" in said


def test_a_models_family_is_read_off_its_index(tmp_path):
    for name, family in {"FluxPipeline": "flux", "StableDiffusionXLPipeline": "sdxl", "ChromaPipeline": "auto"}.items():
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{name}"}}')
        assert choose.family_of(str(tmp_path)) == family
    assert choose.family_of("shapes") == "sd3"
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model_index.json"):
        choose.family_of(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder, and not to be had from the hub"):
        choose.family_of("nowhere/at-all")


def test_what_was_written_and_is_not_as_trained_is_one_message(monkeypatch, capsys, tmp_path):
    def rejected(*args, **options):
        raise loaded_back.NotAsTrained("weights: loaded back, a layer is not what was trained")

    monkeypatch.setattr(generate, "merge", rejected)
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", "shapes", "--lora", str(tmp_path), "--output", str(tmp_path / "merged")])
    assert end.value.code == 2
    assert capsys.readouterr().err == "flowalign: weights: loaded back, a layer is not what was trained\n"
