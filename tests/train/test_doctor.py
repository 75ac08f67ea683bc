"""The doctor: every examination on tiny families, its table and its exit code."""

import pytest
import torch

from flowalign import cli, doctor, generate
from flowalign.pipelines import choose, parity
from flowalign.pipelines.parity import Finding
from tests.pipelines.families import build

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["recording", "ratio gap", "autoencoder", "LoRA file", "memory", "speed", "sanity run"]


@pytest.mark.parametrize("case", ["flux dev", "sd 1.5", "z_image turbo"])
def test_every_examination_passes_on_a_tiny_family(case, monkeypatch):
    monkeypatch.setattr(parity, "CHECKS", {})  # tests of the families run these
    flow = build(case)
    found = list(doctor.examinations(flow, num_steps=4, num_images=1))
    assert [finding.check.startswith(name) for finding, name in zip(found, NAMES, strict=True)] == [True] * len(NAMES)
    assert all(finding.passed for finding in found), found
    assert "PSNR" in found[2].found
    assert "images/s of 4 steps" in found[5].found
    assert "3 steps of AWM" in found[6].found


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
