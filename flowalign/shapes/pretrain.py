"""Pretraining of the shapes pipeline: first the autoencoder, then the denoiser together with its text encoders.

Seeded and resumable: each step's batch and noise depend on the seed and the step alone, each phase's checkpoint holds all states, and the
same command goes on to the same weights. The denoiser's learning rate is constant and then falls linearly to 0 over the last third; the
weights that are saved are an exponential average. Only prompts of the training split are ever drawn.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from flowalign.core.decays import ema_warmup
from flowalign.files import write_atomically
from flowalign.shapes import models
from flowalign.shapes.prompts import Metadata, all_prompts, prompts
from flowalign.shapes.verifier import verify
from flowalign.shapes.world import TAGS, render


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What decides the weights; written beside them.

    Attributes:
        seed: Seed of weights, data and noise.
        autoencoder_steps: Optimizer steps of the autoencoder.
        autoencoder_batch_size: Images of one of its steps.
        steps: Optimizer steps of the denoiser and the text encoders.
        cooldown: Share of the steps, at the end, over which the learning rate falls to 0.
        batch_size: Images of one step.
        learning_rate: Peak learning rate of AdamW for the denoiser and the text encoders.
        autoencoder_learning_rate: Peak learning rate of Adam for the autoencoder, cosine to 0.
        kl_weight: Weight of the posterior's divergence from the standard normal, per latent dimension.
        decay: Decay of the exponential average of the weights that are saved.
        shift: Shift of the noise levels that are drawn, the scheduler's own.
        prompt_dropout: Share of empty prompts, for classifier-free guidance.
        pool_size: Images that are rendered and encoded at once.
        pool_steps: Steps that draw from one pool.
    """

    seed: int = 0
    autoencoder_steps: int = 2200
    autoencoder_batch_size: int = 32
    steps: int = 4500
    cooldown: float = 1 / 3
    batch_size: int = 64
    learning_rate: float = 1e-3
    autoencoder_learning_rate: float = 3e-3
    kl_weight: float = 2e-5
    decay: float = 0.998
    shift: float = 3.0
    prompt_dropout: float = 0.1
    pool_size: int = 16384
    pool_steps: int = 500

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be meant."""
        if self.steps < 1 or not 0 < self.cooldown <= 1:
            raise ValueError(f"steps: got {self.steps}, needed at least 1; cooldown: got {self.cooldown}, needed a share in (0, 1]")


# Shares of the six tags in a batch: relations and pairs are the hardest to learn.
TAG_SHARE = (0.07, 0.17, 0.17, 0.12, 0.25, 0.22)
# Text lengths of the T5 encoder: mostly the short one that flowalign uses, sometimes longer ones up to the pipeline's default.
TEXT_LENGTHS = (models.TEXT_LENGTH, 32, 77, 256)
TEXT_LENGTH_SHARE = (0.94, 0.02, 0.02, 0.02)


def _generator(*parts: int) -> torch.Generator:
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def draw_records(num: int, generator: torch.Generator) -> list[Metadata]:
    """Draw training prompts, tags by ``TAG_SHARE``, with replacement."""
    by_tag = {tag: [record for record in all_prompts("train") if record["tag"] == tag] for tag in TAGS}
    tags = torch.multinomial(torch.tensor(TAG_SHARE), num, replacement=True, generator=generator).tolist()
    picks = torch.rand(num, generator=generator).tolist()
    chosen = [by_tag[TAGS[tag]] for tag in tags]
    return [records[int(pick * len(records))] for records, pick in zip(chosen, picks, strict=True)]


def _save_atomically(state: dict[str, Tensor], meta: dict[str, object], path: Path) -> None:
    temporary = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary, metadata={"meta": json.dumps(meta)})
    os.replace(temporary, path)


def _checkpoint(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    state = {name: value.detach() for name, value in tensors.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"moment/{index}/{name}": torch.as_tensor(value) for name, value in moments.items()}
    _save_atomically(state, {"step": step}, path)


@torch.no_grad()
def _resume(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, path: Path) -> int:
    state = load_file(path)
    for name, value in tensors.items():
        value.copy_(state.pop(name))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        _, index, name = key.split("/")
        moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(max(moment["step"].item() for moment in moments.values()))


def train_autoencoder(pipe: StableDiffusion3Pipeline, config: PretrainConfig, work: Path, *, save_every: int) -> None:
    """Train the autoencoder on fresh renders (squared error plus a weak divergence); set the scaling that gives latents unit variance."""
    vae = pipe.vae
    done, checkpoint = work / "autoencoder.safetensors", work / "autoencoder_steps.safetensors"
    if done.is_file():
        state = load_file(done)
        scale = float(state.pop("scaling_factor"))
        vae.load_state_dict(state)
        vae.register_to_config(scaling_factor=scale)
        return
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.autoencoder_learning_rate, betas=(0.9, 0.99))
    cycle = partial(OneCycleLR, optimizer, config.autoencoder_learning_rate, config.autoencoder_steps, pct_start=0.1)
    weights, schedule, start = dict(vae.named_parameters()), cycle(), 0
    if checkpoint.is_file():
        start = _resume(weights, optimizer, checkpoint)
        schedule = cycle(last_epoch=start - 1)  # building it takes one step
    bar = tqdm(range(start, config.autoencoder_steps), desc="autoencoder", initial=start, total=config.autoencoder_steps, mininterval=10)
    for step in bar:
        generator = _generator(config.seed, 1, step)
        images = render(draw_records(config.autoencoder_batch_size, generator), seed=step) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample(generator)).sample - images).square().mean()
        loss = error + config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(mse=f"{error.item():.5f}")
        if (step + 1) % save_every == 0 or step + 1 == config.autoencoder_steps:
            _checkpoint(weights, optimizer, step + 1, checkpoint)
    records = draw_records(600, _generator(config.seed, 2))
    with torch.no_grad():
        images = render(records, seed=1)
        latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(64)])
        decoded = torch.cat([vae.decode(part).sample / 2 + 0.5 for part in latents.split(64)]).clamp(0, 1)
    kept = verify(decoded, records).strict.double().mean().item()
    print(f"autoencoder: {kept:.4f} of 600 reconstructions pass the verifier", flush=True)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    state = {**vae.state_dict(), "scaling_factor": torch.tensor(vae.config.scaling_factor, dtype=torch.float64)}
    _save_atomically(state, {"reconstructions_strict": kept}, done)


def _pool(pipe: StableDiffusion3Pipeline, config: PretrainConfig, index: int) -> tuple[Tensor, list[str]]:
    """Render and encode the images that ``pool_steps`` steps draw from."""
    records = draw_records(config.pool_size, _generator(config.seed, 3, index))
    images = render(records, seed=1000 + index)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(128)])
    return latents * pipe.vae.config.scaling_factor, [record["prompt"] for record in records]


def _loss(pipe: StableDiffusion3Pipeline, latents: Tensor, texts: list[str], config: PretrainConfig, generator: torch.Generator) -> Tensor:
    """Flow-matching loss of a batch: squared error of the velocity at stratified, shifted noise levels."""
    num = len(latents)
    uniform = (torch.arange(num) + torch.rand(num, generator=generator)) / num
    sigma = config.shift * uniform / (1 + (config.shift - 1) * uniform)
    noise = torch.randn(latents.shape, generator=generator)
    dropped = torch.rand(num, generator=generator) < config.prompt_dropout
    length = TEXT_LENGTHS[int(torch.multinomial(torch.tensor(TEXT_LENGTH_SHARE), 1, generator=generator))]
    texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
    embeds, _, pooled, _ = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
    level = sigma[:, None, None, None]
    x = (1 - level) * latents + level * noise
    velocity = pipe.transformer(
        hidden_states=x, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=sigma * 1000, return_dict=False
    )[0]
    return (velocity - (noise - latents)).square().mean()


def sample_score(
    pipe: StableDiffusion3Pipeline, records: list[Metadata], *, num_steps: int, guidance_scale: float = 1.0
) -> dict[str, float]:
    """Sample one image for each prompt and return the strict score of each tag and their mean."""
    strict = []
    for start in range(0, len(records), 64):
        part = records[start : start + 64]
        images = pipe(
            [record["prompt"] for record in part],
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=models.TEXT_LENGTH,
            generator=_generator(start),
            output_type="pt",
        ).images
        strict += verify(images, part).strict.tolist()
    scores = {}
    for tag in TAGS:
        of_tag = [ok for ok, record in zip(strict, records, strict=True) if record["tag"] == tag]
        scores[tag] = sum(of_tag) / max(1, len(of_tag))
    return {"overall": sum(scores.values()) / len(TAGS), **scores}


class _Weights:
    """The trained modules of the pipeline under one set of names, with their exponential average."""

    def __init__(self, pipe: StableDiffusion3Pipeline, decay: float) -> None:
        self.modules = nn.ModuleDict(
            {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
        )
        self.decay = ema_warmup(decay)
        self.average = {name: value.detach().clone() for name, value in self.modules.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        average = {f"average/{name}": value for name, value in self.average.items()}
        return {f"weight/{name}": value for name, value in self.modules.named_parameters()} | average

    @torch.no_grad()
    def update(self, step: int) -> None:
        for name, value in self.modules.named_parameters():
            self.average[name].lerp_(value, 1 - self.decay(step))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with their average."""
        for name, value in self.modules.named_parameters():
            kept = value.detach().clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)


def _start_small(pipe: StableDiffusion3Pipeline) -> None:
    """Begin with closed gates (Peebles and Xie, "DiT", 2022, adaLN-Zero) and an output of zero: much faster in the first steps."""
    for block in pipe.transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(pipe.transformer.proj_out.weight)


@torch.no_grad()
def _export(pipe: StableDiffusion3Pipeline, weights: _Weights, folder: Path, about: dict[str, object]) -> None:
    """Write the averaged weights as a diffusers folder: denoiser and autoencoder in half precision, which diffusers loads as float32."""
    # Copies, and a pipeline of their own: the rounding must not flow back into training.
    parts = copy.deepcopy(weights.modules)
    for name, value in parts.named_parameters():
        value.copy_(weights.average[name])
    exported = StableDiffusion3Pipeline(**{**pipe.components, **dict(parts.items()), "vae": copy.deepcopy(pipe.vae)})
    exported.encode_prompt("", None, None)  # tokenizers write down how they were called last, which must be the same after a resume
    for module in (exported.transformer, exported.vae):
        module.half()
    exported.save_pretrained(folder, safe_serialization=True)
    (folder / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n")


def train_denoiser(
    pipe: StableDiffusion3Pipeline, config: PretrainConfig, work: Path, *, evaluate_every: int, report: Callable[[str], None]
) -> _Weights:
    """Train denoiser and text encoders by flow matching; resume from ``work`` when a checkpoint lies there."""
    _start_small(pipe)
    weights = _Weights(pipe, config.decay)
    optimizer = torch.optim.AdamW(weights.modules.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = work / "denoiser.safetensors"
    start = _resume(weights.tensors(), optimizer, checkpoint) if checkpoint.is_file() else 0
    records = prompts("heldout", seed=1, num=150)
    pool_index, latents, texts = -1, torch.empty(0), [""]
    losses: list[float] = []
    began = time.monotonic()
    for step in tqdm(range(start, config.steps), desc="denoiser", initial=start, total=config.steps, mininterval=20):
        if step // config.pool_steps != pool_index:
            pool_index = step // config.pool_steps
            latents, texts = _pool(pipe, config, pool_index)
        generator = _generator(config.seed, 4, step)
        chosen = torch.randint(config.pool_size, (config.batch_size,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 100, (config.steps - step) / (config.cooldown * config.steps))
        loss = _loss(pipe, latents[chosen], [texts[i] for i in chosen.tolist()], config, generator)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights.modules.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"step {step}: the gradient of the denoiser is not finite")
        optimizer.step()
        weights.update(step)
        losses.append(loss.item())
        if (step + 1) % evaluate_every == 0 or step + 1 == config.steps:
            _checkpoint(weights.tensors(), optimizer, step + 1, checkpoint)
            weights.swap()
            scores = sample_score(pipe, records, num_steps=8)
            weights.swap()
            line = {"step": step + 1, "time_s": round(time.monotonic() - began), "loss": sum(losses) / len(losses), **scores}
            report(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}))
            losses.clear()
            _export(pipe, weights, work / f"step_{step + 1}", {"config": asdict(config), "log": line})
    return weights


def pretrain(output: Path, config: PretrainConfig, *, threads: int = 2, evaluate_every: int = 500) -> Path:
    """Pretrain the shapes pipeline and write it as an ordinary diffusers folder.

    Args:
        output: Folder for the result; ``output/work`` holds the checkpoints, and the same call goes on from them.
        config: What decides the weights.
        threads: CPU threads.
        evaluate_every: Steps between checkpoints, of the autoencoder and the denoiser, and held-out scores (8 Euler steps, no guidance).

    Returns:
        The folder, loadable with ``StableDiffusion3Pipeline.from_pretrained``.

    Raises:
        ValueError: If ``output/work`` was begun with another configuration.
    """
    torch.set_num_threads(threads)
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    begun, now = work / "config.json", asdict(config)
    if begun.is_file() and (before := json.loads(begun.read_text())) != now:
        changed = ", ".join(k for k in now if before.get(k) != now[k])
        raise ValueError(f"{work}: begun with another configuration (changed: {changed}); choose another --output or remove it")
    write_atomically(begun, json.dumps(now, indent=2) + "\n")
    pipe = models.new_pipeline(config.seed)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(config.seed)
    train_autoencoder(pipe, config, work, save_every=evaluate_every)
    pipe.vae.requires_grad_(False)

    def report(line: str) -> None:
        with (work / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        tqdm.write(line)

    weights = train_denoiser(pipe, config, work, evaluate_every=evaluate_every, report=report)
    _export(pipe, weights, output, {"config": asdict(config)})
    return output
