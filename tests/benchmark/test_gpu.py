"""The benchmark of a GPU runs on a CPU with tiny sizes; its recipes and real sizes are those that it says."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from benchmarks import gpu, random_models
from flowalign.algorithms import awm, flow_grpo

NAME = {"model": "flux", "blocks": "eager"}
TOLD = "CUDA out of memory. Tried to allocate 20.00 GiB."
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_cell_is_measured_and_written(tmp_path, monkeypatch, capsys):
    written = tmp_path / "gpu.json"
    asked = ["gpu", "--smoke", "--models", "flux", "--algorithms", "flow_grpo", "--ways", "eager", "--steps", "1", "--output", str(written)]
    monkeypatch.setattr("sys.argv", asked)
    gpu.main()
    result = json.loads(written.read_text())
    (cell,) = result["cells"]
    assert result["smoke"] is True
    assert (cell["model"], cell["algorithm"], cell["blocks"]) == ("flux", "flow_grpo", "eager")
    for name in ("rollout", "train", "total"):
        assert cell["tflops"][name] > 0
        assert 0 < cell["utilisation"][name] < 2  # of a peak that is measured while other work goes on
    assert cell["images_per_s"] > 0
    assert cell["rows_per_s"] > 0
    said = capsys.readouterr().out
    assert gpu.row("flux", "flow_grpo", "eager", cell) in said


def test_a_cell_without_memory_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    written = tmp_path / "gpu.json"
    asked = ["gpu", "--smoke", "--models", "flux", "--ways", "eager", "--steps", "1", "--output", str(written)]
    monkeypatch.setattr("sys.argv", asked)
    made, seen = [], []

    def cell(pipe, name, options, *, warms_up):
        assert warms_up  # each pipeline is a new one
        seen.append(pipe)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        # What was measured before stands in the file already.
        assert json.loads(written.read_text())["cells"] == [{**NAME, "algorithm": "awm", "failed": f"out of memory: {TOLD}"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_make", lambda *args, **options: made.append(object()) or made[-1])
    monkeypatch.setattr(gpu, "_cell", cell)
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert seen == made
    assert len(made) == 2  # the first may hold what filled the memory
    assert f"| flux | awm | eager | out of memory: {TOLD} |" in capsys.readouterr().out


def test_no_cell_begins_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    asked = [
        "gpu",
        "--smoke",
        "--models",
        "sd35m",
        "--algorithms",
        "awm",
        "--ways",
        "eager",
        "--limit",
        "0",
        "--output",
        str(tmp_path / "a"),
    ]
    monkeypatch.setattr("sys.argv", asked)
    monkeypatch.setattr(gpu, "measure", lambda *args, **options: pytest.fail("began"))
    gpu.main()
    assert "| sd35m | awm | eager | not begun: 0 s are over |" in capsys.readouterr().out
    assert json.loads((tmp_path / "a").read_text())["cells"] == []


def test_without_a_gpu_the_smoke_test_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--smoke runs the same code on the CPU" in capsys.readouterr().err


def test_sizes_are_those_of_the_published_models(tmp_path):
    with torch.device("meta"):
        sizes = [
            sum(value.numel() for value in kind(**config).parameters())
            for kind, config in ((SD3Transformer2DModel, random_models.SD35_MEDIUM), (FluxTransformer2DModel, random_models.FLUX_DEV))
        ]
    assert sizes[0] == pytest.approx(2.24e9, rel=0.1)
    assert sizes[1] == pytest.approx(11.9e9, rel=0.02)
    for model, steps, guidance in (("sd35m", 10, 4.5), ("flux", 6, 3.5)):
        config = gpu.configuration(model, "flow_grpo", tmp_path, smoke=False)
        assert isinstance(config.algorithm, flow_grpo.Config)
        assert (config.pipeline.num_steps, config.pipeline.guidance_scale) == (steps, guidance)
        assert config.pipeline.gradient_checkpointing
        assert (config.pipeline.height, config.pipeline.width, config.pipeline.dtype) == (512, 512, "bfloat16")
        assert isinstance(gpu.configuration(model, "awm", tmp_path, smoke=False).algorithm, awm.Config)
