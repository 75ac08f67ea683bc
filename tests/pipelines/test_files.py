"""Files: what is written loads anywhere, and nothing half-written takes its name."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from flowalign.core.plans import ode
from flowalign.pipelines import lora_files
from flowalign.pipelines.loading import quiet
from flowalign.pipelines.roles import LoRA
from tests.pipelines.conftest import STEPS
from tests.pipelines.tiny import PROMPTS, initial, noise, nudge, probe, untouched


def images_of(pipe, flow, **options):
    return pipe(
        "bb",
        latents=initial(1),
        num_inference_steps=STEPS,
        guidance_scale=flow.family.guidance_scale,
        max_sequence_length=12,
        output_type="pt",
        **options,
    ).images


def made(flow, role="current"):
    return flow.decode(flow.rollout(flow.encode(["bb"]), ode(STEPS), x_init=initial(1), noise=noise, role=role).x0)


def test_a_saved_adapter_gives_the_same_images_in_an_untouched_pipeline(fresh, folder, tmp_path):
    nudge(fresh)
    fresh.save(tmp_path / "weights")
    pipe = untouched(folder)
    base = images_of(pipe, fresh)
    pipe.load_lora_weights(tmp_path / "weights")
    assert torch.equal(images_of(pipe, fresh), made(fresh))
    assert not torch.equal(images_of(pipe, fresh), base)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_rank_alpha_and_targets_survive_in_the_file(build, tmp_path):
    flow = build(lora=LoRA(rank=3, alpha=12, targets=("attn.to_q", "ff.net.2")))
    nudge(flow)
    flow.save(tmp_path / "weights")
    rank, alpha, targets = lora_files.settings(tmp_path / "weights")
    assert (rank, alpha) == (3, 12.0)
    again = build(lora=LoRA(rank=rank, alpha=alpha, targets=targets), seed=9)
    again.load_lora(tmp_path / "weights")
    assert torch.equal(made(again), made(flow))
    with safe_open(tmp_path / "weights" / lora_files.LORA_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 12


def test_any_role_can_be_saved(build, tmp_path):
    flow = build()
    flow.roles.add("ema")
    nudge(flow)
    flow.roles.blend("ema", 0.5)
    flow.save(tmp_path / "weights", role="ema")
    again = build()
    again.load_lora(tmp_path / "weights")
    assert torch.equal(made(again), made(flow, "ema"))
    assert not torch.equal(made(again), made(flow))
    with pytest.raises(ValueError, match="has no adapter to save"):
        flow.save(tmp_path / "base", role="reference")


def test_saving_disturbs_nothing(build, tmp_path):
    flow = build()
    flow.roles.add("ema")
    cond = nudge(flow)
    before, parts = probe(flow, cond), dict(vars(flow.pipe))
    flow.velocity(initial(), torch.tensor(0.5), cond).square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in flow.roles.trainable_parameters()]
    flow.save(tmp_path / "weights")
    assert torch.equal(probe(flow, cond), before)
    assert all(vars(flow.pipe)[name] is value for name, value in parts.items())
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(flow.roles.trainable_parameters(), gradients, strict=True))
    assert all(parameter.requires_grad for parameter in flow.roles.trainable_parameters())
    assert set(flow.denoiser.peft_config) == {"current", "ema"}


def test_a_half_precision_base_saves_and_loads(build, tmp_path):
    flow = build(dtype="bfloat16")
    cond = nudge(flow)
    flow.save(tmp_path / "weights")
    again = build(dtype="bfloat16", seed=3)
    again.load_lora(tmp_path / "weights")
    assert torch.equal(probe(again, again.encode(PROMPTS)), probe(flow, cond))


def test_full_weights_are_saved_as_a_pipeline(build, tmp_path):
    flow = build(lora=None)
    nudge(flow, 1e-3)
    flow.roles.add("ema")
    nudge(flow, 1e-3)
    for role in ("current", "ema"):
        flow.save(tmp_path / role, role=role)
        with quiet():
            pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / role)
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(images_of(pipe, flow), made(flow, role))
    assert not torch.equal(made(flow), made(flow, "ema"))


def test_a_pipeline_without_a_third_encoder_is_saved_whole(build, folder_without_t5, tmp_path):
    flow = build(model=str(folder_without_t5), lora=None)
    nudge(flow, 1e-3)
    flow.save(tmp_path / "model")
    assert torch.equal(made(build(model=str(tmp_path / "model"), lora=None)), made(flow))


@pytest.mark.parametrize("spoil", ["a tensor", "the scale", "the file"])
def test_what_was_written_wrongly_never_takes_its_name(build, tmp_path, monkeypatch, spoil):
    flow = build()
    nudge(flow)
    flow.save(tmp_path / "weights")
    good = (tmp_path / "weights" / lora_files.LORA_FILE).read_bytes()
    nudge(flow)
    write = flow.pipe.save_lora_weights

    def spoilt(folder, transformer_lora_layers, transformer_lora_adapter_metadata, **options):
        if spoil == "a tensor":
            transformer_lora_layers = {name: tensor * 1.5 for name, tensor in transformer_lora_layers.items()}
        if spoil == "the scale":
            transformer_lora_adapter_metadata = {**transformer_lora_adapter_metadata, "lora_alpha": 1}
        write(
            folder,
            transformer_lora_layers=transformer_lora_layers,
            transformer_lora_adapter_metadata=transformer_lora_adapter_metadata,
            **options,
        )
        if spoil == "the file":
            raise OSError("no space left")

    monkeypatch.setattr(flow.pipe, "save_lora_weights", spoilt)
    with pytest.raises((RuntimeError, OSError), match="is not what was trained|does not behave like|no space left"):
        flow.save(tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert (tmp_path / "weights" / lora_files.LORA_FILE).read_bytes() == good


def test_files_that_do_not_fit_are_refused_and_change_nothing(build, tmp_path):
    flow = build()
    nudge(flow)
    flow.save(tmp_path / "weights")
    for lora, reason in (
        (LoRA(rank=8, alpha=8), "has rank 4 and alpha 8, the pipeline was built with 8"),
        (LoRA(rank=4, alpha=64), "has rank 4 and alpha 8, the pipeline was built with 4 and 64"),
        (LoRA(rank=4, alpha=8, targets=("attn.to_q",)), "not a LoRA of these layers"),
        (None, "built without adapters"),
    ):
        with pytest.raises(ValueError, match=reason):
            build(lora=lora).load_lora(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="no LoRA there"):
        flow.load_lora(tmp_path)
    path = tmp_path / "weights" / lora_files.LORA_FILE
    path.write_bytes(path.read_bytes()[:-100])
    other = build()
    before = probe(other, other.encode(PROMPTS))
    with pytest.raises(ValueError, match="truncated"):
        other.load_lora(tmp_path / "weights")
    assert torch.equal(probe(other, other.encode(PROMPTS)), before)
