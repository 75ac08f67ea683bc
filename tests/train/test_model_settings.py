"""Settings of a model on the command line: read as those of a run are, and used."""

import pytest
import torch

from flowalign import cli, doctor, evaluation, generate
from flowalign.config import ConfigError
from flowalign.model_settings import override, settings_for
from flowalign.pipelines import auto, sd3
from flowalign.pipelines.base import FlowPipeline
from flowalign.pipelines.roles import LoRA
from flowalign.run_config import load_config

SAID_BY = {"model": "MODEL"}


def test_settings_are_changed_as_those_of_a_run_are():
    fields = ["--pipeline.dtype", "bfloat16", "--pipeline.height=64", "--pipeline.offload", "true", "--pipeline.lora.rank", "8"]
    changed = override(sd3.Config(model="m"), fields, said_by=SAID_BY)
    assert changed == sd3.Config(model="m", dtype="bfloat16", height=64, offload=True, lora=LoRA(rank=8))
    told = override(auto.Config(model="m"), ["--pipeline.arguments.max_sequence_length", "64"], said_by=SAID_BY)
    assert told == auto.Config(model="m", arguments={"max_sequence_length": 64})
    assert override(auto.Config(model="m", height=32), ["--pipeline.type", "sd3"], said_by=SAID_BY) == sd3.Config(model="m")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--pipeline.dytpe", "bfloat16"], "pipeline.dytpe: unknown key; did you mean 'dtype'?"),
        (["--pipeline.zzz", "1"], "pipeline.zzz: unknown key; known are .*gradient_checkpointing"),
        (["--pipeline.dtype", "half"], "pipeline.dtype: got 'half', needed one of float32, bfloat16, float16"),
        (["--pipeline.model", "x"], "--pipeline.model: this command takes it as MODEL"),
        (["--train.groups", "2"], "--train.groups: unknown option; settings of the model are --pipeline.KEY VALUE"),
        (["--pipeline.height"], "needs a value"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        override(sd3.Config(model="m"), fields, said_by=SAID_BY)


def test_a_configuration_of_a_run_stands_for_its_model():
    name = "sd35m_awm_pickscore"
    assert settings_for(name, said_by=SAID_BY) == load_config(name).pipeline
    assert settings_for(name, ["--pipeline.height", "256"], said_by=SAID_BY).height == 256


@pytest.fixture
def calls(monkeypatch):
    """Precision and number of images of each rollout."""
    seen, honest = [], FlowPipeline.rollout

    def rollout(flow, cond, *args, **options):
        seen.append((flow.dtype, len(cond)))
        return honest(flow, cond, *args, **options)

    monkeypatch.setattr(FlowPipeline, "rollout", rollout)
    return seen


def test_evaluate_and_sample_use_the_settings_and_the_size_of_a_batch(model, calls, tmp_path, capsys):
    fields = ["--pipeline.dtype", "bfloat16", "--pipeline.max_sequence_length", "16"]
    result = evaluation.evaluate(str(model), fields=fields, num_prompts=3, images_per_prompt=1, num_steps=2, batch_size=2)
    assert result["settings"]["dtype"] == "bfloat16"
    assert calls == [(torch.bfloat16, 2), (torch.bfloat16, 1)]
    calls.clear()
    asked = ["sample", str(model), *fields, "a ring", "a star", "--num-images", "1", "--num-steps", "2", "--batch-size", "1"]
    cli.main([*asked, "--output", str(tmp_path / "samples.png")])
    assert calls == [(torch.bfloat16, 1)] * 2
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.parametrize("command", [["sample", "shapes", "a ring"], ["evaluate", "shapes"]])
def test_float16_is_asked_for_and_refused_on_a_cpu(command, capsys, monkeypatch):
    monkeypatch.setattr(generate, "Accelerator", lambda: torch.empty(0))  # its device is the CPU
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--pipeline.dtype", "float16"])
    assert left.value.code == 2
    assert "pipeline.dtype: float16 is not usable on a CPU" in capsys.readouterr().err


def test_the_doctor_examines_the_model_with_the_settings(model, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(doctor, "examinations", lambda flow, **options: seen.append(flow) or iter(()))
    cli.main(["doctor", str(model), "--pipeline.dtype", "bfloat16", "--pipeline.lora.rank", "2"])
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].roles.lora.rank == 2
    assert "bfloat16" in capsys.readouterr().out
