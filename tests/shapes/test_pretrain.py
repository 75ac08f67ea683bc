import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign.shapes import models, pretrain
from flowalign.shapes.prompts import all_prompts

# Checkpoints and exports in the middle of a pool: what is encoded again after a resume must come from the very same autoencoder.
CONFIG = pretrain.PretrainConfig(
    autoencoder_steps=4, autoencoder_batch_size=4, steps=4, batch_size=4, pool_size=16, pool_steps=3, learning_rate=1e-2, cooldown=0.5
)


class Killed(BaseException):
    """The process ends here; nothing in the module can catch it."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_quick_scores():
    # The number of threads is part of the result; scores and the latents' scale are not what is tested, so few images do for both.
    score, draw, threads = pretrain.sample_score, pretrain.draw_records, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "sample_score", lambda pipe, records, num_steps: score(pipe, records[:2], num_steps=1))
        patch.setattr(pretrain, "draw_records", lambda num, generator: draw(min(num, 16), generator))
        for module in (pretrain, models):
            patch.setattr(module, "all_prompts", functools.cache(all_prompts))
        yield
    torch.set_num_threads(threads)


def run(output):
    return pretrain.pretrain(output, CONFIG, threads=1, evaluate_every=2)


def kill_at(monkeypatch, owner, name, call, *, when):
    """Let the function end the run instead of its ``call``-th call, counted among those that ``when`` takes."""
    real, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(when(*args))
        if calls[-1] and sum(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, deadly)


def bits(folder):
    """Every byte that a run is to give again: the result, both checkpoints and the scores, but not the time that it took."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")}
    for name, content in found.items():
        if name.name == "pretraining.json":
            about = json.loads(content)
            about.get("log", {}).pop("time_s", None)
            found[name] = about
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return bits(run(tmp_path_factory.mktemp("unbroken")))


def always(*args):
    return True


def of(name):
    return lambda *args: Path(args[-1]).name == name


# Where the run ends (a function, and which of its calls), and the optimizer steps that the resumed one takes: (autoencoder, denoiser).
PLACES = {
    "autoencoder, after a checkpoint": ("render", 4, always, (2, 4)),
    "autoencoder, as a checkpoint is put in place": ("replace", 2, of("autoencoder_steps.safetensors"), (2, 4)),
    "autoencoder, after its last step": ("verify", 1, always, (0, 4)),
    "denoiser, after a checkpoint": ("_loss", 4, always, (0, 2)),
    "denoiser, as a checkpoint is put in place": ("replace", 2, of("denoiser.safetensors"), (0, 2)),
    "denoiser, after its last step": ("_export", 3, always, (0, 0)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_and_resumed_run_ends_with_the_bits_of_an_unbroken_one_and_repeats_only_what_no_checkpoint_holds(
    place, unbroken, tmp_path, monkeypatch
):
    name, call, when, repeated = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, pretrain.os if name == "replace" else pretrain, name, call, when=when)
        with pytest.raises(Killed):
            run(tmp_path)
    assert not (tmp_path / "model_index.json").exists()
    steps, generator = [], pretrain._generator
    monkeypatch.setattr(pretrain, "_generator", lambda *parts: steps.append(parts[1:2]) or generator(*parts))
    resumed = bits(run(tmp_path))
    assert (steps.count((1,)), steps.count((4,))) == repeated
    assert resumed.keys() == unbroken.keys()
    assert [str(path) for path in unbroken if resumed[path] != unbroken[path]] == []


def test_a_resumed_autoencoder_has_the_learning_rates_and_momenta_of_an_unbroken_one(tmp_path, monkeypatch):
    seen = []

    class Adam(torch.optim.Adam):
        def step(self, closure=None):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["betas"]))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    pipe = models.new_pipeline(0)
    pretrain.train_autoencoder(pipe, CONFIG, tmp_path, save_every=2)
    unbroken = list(seen)
    (tmp_path / "autoencoder.safetensors").unlink()
    (tmp_path / "autoencoder_steps.safetensors").unlink()
    seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, pretrain, "render", 4, when=always)
        with pytest.raises(Killed):
            pretrain.train_autoencoder(models.new_pipeline(0), CONFIG, tmp_path, save_every=2)
    del seen[2:]  # The third step was after the checkpoint.
    pretrain.train_autoencoder(models.new_pipeline(0), CONFIG, tmp_path, save_every=2)
    assert seen == unbroken
    assert len(set(unbroken)) == CONFIG.autoencoder_steps


def with_an_average_of_its_own():
    """A new pipeline whose averaged weights are not its weights."""
    pipe = models.new_pipeline(0)
    weights = pretrain._Weights(pipe, CONFIG.decay)
    with torch.no_grad():
        for value in weights.average.values():
            value.mul_(0.7)
    return pipe, weights


def test_exporting_changes_no_bit_of_the_training_state(tmp_path):
    pipe, weights = with_an_average_of_its_own()

    def state():
        modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
        tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
        return tensors | {f"average.{name}": value for name, value in weights.average.items()}

    before = {name: value.clone() for name, value in state().items()}
    objects = {name: id(value) for name, value in weights.modules.named_parameters()}
    pretrain._export(pipe, weights, tmp_path, {})
    after = state()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    assert {name: id(value) for name, value in weights.modules.named_parameters()} == objects
    assert any(not torch.equal(value, value.half().float()) for value in before.values())  # Rounding would have been seen.


def test_what_is_exported_is_the_average_with_denoiser_and_autoencoder_in_half_precision(tmp_path):
    pipe, weights = with_an_average_of_its_own()
    pretrain._export(pipe, weights, tmp_path, {})
    for module, file, dtype in (
        ("transformer", "diffusion_pytorch_model", torch.float16),
        ("text_encoder", "model", torch.float32),
        ("text_encoder_2", "model", torch.float32),
        ("text_encoder_3", "model", torch.float32),
    ):
        saved = load_file(tmp_path / module / f"{file}.safetensors")
        names = dict(getattr(pipe, module).named_parameters())
        assert all(torch.equal(saved[name], weights.average[f"{module}.{name}"].to(dtype)) for name in names), module
    saved = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value.half()) for name, value in pipe.vae.state_dict().items())
    assert models.load_pipeline(tmp_path).transformer.dtype == torch.float32
