"""Files: what is written loads anywhere, and nothing half-written takes its name."""

import json
import warnings

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from flowalign.core.plans import ode
from flowalign.pipelines import loaded_back, lora_files
from flowalign.pipelines.fingerprint import fingerprint
from flowalign.pipelines.loading import quiet
from flowalign.pipelines.roles import LoRA
from tests.pipelines.conftest import STEPS
from tests.pipelines.tiny import PROMPTS, initial, noise, nudge, probe, tiny_pipeline, untouched


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


def everything(flow):
    """All that a save could disturb: every tensor by identity and value, what is trained, which adapter acts, what peft knows."""
    parameters = dict(flow.denoiser.named_parameters())
    return {
        "identities": {name: id(value) for name, value in parameters.items()},
        "values": {name: value.detach().clone() for name, value in parameters.items()},
        "trained": {name: value.requires_grad for name, value in parameters.items()},
        "modules": [(name, id(module), module.training) for name, module in flow.denoiser.named_modules()],
        "acting": [(name, layer.active_adapters, layer.disable_adapters) for name, layer in flow.roles._layers.items()],
        "scales": [dict(layer.scaling) for layer in flow.roles._layers.values()],
        "adapters": set(flow.denoiser.peft_config),
        "roles": (list(flow.roles.names), flow.roles.active),
        "parts": {name: id(part) for name, part in flow.pipe.components.items()},
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("role", ["current", "ema"])
def test_saving_disturbs_nothing(build, tmp_path, role):
    flow = build()
    flow.roles.add("ema")
    cond = nudge(flow)
    optimizer = torch.optim.AdamW(flow.roles.trainable_parameters())
    before = probe(flow, cond)
    flow.velocity(initial(), torch.tensor(0.5), cond).square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in flow.roles.trainable_parameters()]
    seen = everything(flow)
    flow.save(tmp_path / "weights", role)
    after = everything(flow)
    assert all(torch.equal(value, after["values"][name]) for name, value in seen.pop("values").items())
    assert torch.equal(seen.pop("random"), after["random"])
    assert [name for name, value in seen.items() if after[name] != value] == []
    assert torch.equal(probe(flow, cond), before)
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(flow.roles.trainable_parameters(), gradients, strict=True))
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in flow.roles.trainable_parameters()}
    optimizer.step()
    assert not torch.equal(probe(flow, cond), before)


def test_no_second_network_is_made_to_check_a_lora(build, tmp_path, monkeypatch):
    flow = build()
    nudge(flow)
    copied, seen, honest = lora_files.copy.deepcopy, [], lora_files.compare_behaviour
    monkeypatch.setattr(
        lora_files.copy, "deepcopy", lambda it, *rest: pytest.fail("a copy") if isinstance(it, torch.nn.Module) else copied(it, *rest)
    )

    def compare(pipeline, role, loaded, **options):
        seen.append(loaded)
        honest(pipeline, role, loaded, **options)

    monkeypatch.setattr(lora_files, "compare_behaviour", compare)
    flow.save(tmp_path / "weights")
    assert seen[0].network is flow.denoiser
    assert seen[0].pipe.transformer is flow.denoiser


@pytest.mark.parametrize("lora", [LoRA(rank=4, alpha=8), None])
def test_where_there_is_no_memory_for_the_check_the_file_is_kept_and_said_to_be_unchecked(build, tmp_path, monkeypatch, lora):
    flow = build(lora=lora)
    nudge(flow, 1e-3)
    seen = list(flow.roles.names), list(dict(flow.denoiser.named_parameters()))

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(lora_files, "compare_behaviour", full)
    with pytest.warns(UserWarning, match=r"weights: written, but not checked.*Tried to allocate 20.00 GiB"):
        flow.save(tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert (list(flow.roles.names), list(dict(flow.denoiser.named_parameters()))) == seen
    if lora is not None:
        again = build()
        again.load_lora(tmp_path / "weights")
        assert torch.equal(made(again), made(flow))
    else:
        assert torch.equal(made(build(model=str(tmp_path / "weights"), lora=None)), made(flow))


@pytest.mark.parametrize(
    ("dtype", "difference", "fits"),
    [
        ("float32", {"rest": 0.0, "few": 0.4}, False),
        ("float32", {"rest": 5e-3, "few": 5e-3}, True),
        ("bfloat16", {"rest": 4e-3, "few": 0.4}, True),  # as measured, and a few pixels that rounding tips over
        ("bfloat16", {"rest": 0.04, "few": 0.04}, False),
        ("bfloat16", {"rest": 0.0, "few": 0.0, "some": 0.2}, False),
    ],
)
def test_in_half_precision_a_picture_is_judged_by_its_mean_and_a_high_quantile(build, tmp_path, monkeypatch, dtype, difference, fits):
    flow = build(dtype=dtype)
    nudge(flow)
    apart = torch.full((1000,), difference["rest"])
    apart[:5] = difference["few"]
    apart[5:30] = difference.get("some", difference["rest"])
    monkeypatch.setattr(loaded_back, "picture_difference", lambda *args: apart)
    if fits:
        flow.save(tmp_path / "weights")
        assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    else:
        with pytest.raises(RuntimeError, match="makes another picture than the trained weights"):
            flow.save(tmp_path / "weights")
        assert [path.name for path in tmp_path.iterdir()] == ["weights.rejected"]


def test_a_wrong_scale_is_found_in_half_precision_too(build, tmp_path, monkeypatch):
    flow = build(dtype="bfloat16")
    nudge(flow, 3e-2)
    metadata = flow.roles.lora_metadata
    monkeypatch.setattr(flow.roles, "lora_metadata", lambda: {**metadata(), "lora_alpha": 1})
    with pytest.raises(RuntimeError, match="does not behave like the trained weights"):
        flow.save(tmp_path / "weights")


def test_a_lora_of_another_base_is_refused_by_its_weights(build, tmp_path):
    flow = build()
    nudge(flow)
    flow.save(tmp_path / "weights", notes={"base_model": "owner/base"})
    with quiet():
        tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    other = build(model=str(tmp_path / "other"))
    before = made(other)
    with pytest.raises(ValueError, match=r"is a LoRA of another base \(owner/base\) than other, whose weights differ"):
        other.load_lora(tmp_path / "weights")
    assert torch.equal(made(other), before)
    # The same base under another name, or in half precision, is the same base.
    with quiet():
        tiny_pipeline().save_pretrained(tmp_path / "renamed")
    for options in ({"model": str(tmp_path / "renamed")}, {"dtype": "bfloat16"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(**options, seed=5).load_lora(tmp_path / "weights")
    wider = build(lora=LoRA(rank=2, alpha=2, targets=("attn.to_q", "ff.net.2")))
    assert fingerprint(wider.roles) == fingerprint(flow.roles)
    with torch.no_grad():  # what a merged LoRA would change
        for layer in flow.roles._layers.values():
            layer.base_layer.weight *= 1.01
    assert fingerprint(wider.roles) != fingerprint(flow.roles)


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
    kept = r"what was written is kept as .*weights\.rejected"
    with pytest.raises((RuntimeError, OSError), match=f"is not what was trained.*{kept}|does not behave like.*{kept}|no space left"):
        flow.save(tmp_path / "weights")
    # What was written whole may be all that is left of a long run.
    names = ["weights"] if spoil == "the file" else ["weights", "weights.rejected"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if spoil == "a tensor":
        assert (tmp_path / "weights.rejected" / lora_files.LORA_FILE).is_file()
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
