"""A diffusers pipeline as a trajectory generator: its own ``__call__`` drives, we watch, and replay what the denoiser was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowalign.core.kernels import sample
from flowalign.core.plans import Plan
from flowalign.core.rollout import Trajectory, Transitions, transition_rows
from flowalign.pipelines import lora_files
from flowalign.pipelines.conditioning import Conditioning, Layout, Leaf, learn, split, stack
from flowalign.pipelines.record import Left, Probe, installed, run_probe
from flowalign.pipelines.replay import Replay, learn_replay
from flowalign.pipelines.roles import CURRENT, LoRA, Roles

NoiseSource = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cannot be read off a recording.

    Attributes:
        denoiser: The pipeline's attribute that holds the denoiser.
        arguments: What every call of the pipeline gets: sizes, guidance, text length.
        guidance_scale: The guidance among them.
        event_shape: Shape of the latents of one sample.
        embeds: From conditioning to the arguments of ``__call__`` that carry prompt embeddings.
        decode: From pipeline and latents to images in [0, 1].
        targets: Default LoRA targets.
    """

    denoiser: str
    arguments: Mapping[str, Any]
    guidance_scale: float
    event_shape: tuple[int, ...]
    embeds: Callable[[Conditioning], Mapping[str, Any]]
    decode: Callable[[DiffusionPipeline, Tensor], Tensor]
    targets: tuple[str, ...]


class FlowPipeline:
    """A pipeline of any family behind one protocol: encode, rollout, velocity, decode, sigmas, save and its roles.

    Attributes:
        pipe: The diffusers pipeline.
        family: Its family.
        roles: Versions of its denoiser.
        module: What is called in a replay; training puts the wrapped (DDP) denoiser here.
        num_steps: Default number of steps.
    """

    def __init__(self, pipe: DiffusionPipeline, family: Family, lora: LoRA | None, *, num_steps: int, seed: int = 0) -> None:
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self.pipe, self.family, self.num_steps = pipe, family, num_steps
        self.denoiser: nn.Module = getattr(pipe, family.denoiser)
        self.roles = Roles(self.denoiser, lora, family.targets, seed=seed)
        self.module = self.denoiser
        self._encoded: dict[str, tuple[Leaf, ...]] = {}
        self._layout: Layout | None = None
        self._replay: Replay | None = None
        self._grids: dict[int, Tensor] = {}
        self._timesteps: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return next(p.dtype for name, p in self.denoiser.named_parameters() if "lora_" not in name)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one sample."""
        return self.family.event_shape

    def _probe(self, probe: Probe, prompts: Sequence[str], num_steps: int) -> Probe:
        latents = torch.zeros(len(prompts), *self.event_shape, device=self.device)
        # Any latents do, as long as samples differ: a constant could hide a wrong axis.
        latents = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        arguments = {**self.family.arguments, "prompt": list(prompts), "num_inference_steps": num_steps, "latents": latents.to(self.dtype)}
        return run_probe(self.pipe, self.family.denoiser, self.denoiser, probe, arguments)

    def _learn(self) -> tuple[Layout, Replay]:
        """Work out from three short recordings where the batch is, what the timestep is and how outputs are combined."""
        if self._layout is None or self._replay is None:
            with self.roles.use(CURRENT):
                steps = self._probe(Probe(num_steps=3), ["a", "b"], self.num_steps if self.num_steps > 2 else 3).steps
                one = self._probe(Probe(num_steps=1), ["a"], 3).steps[0].calls
                two = self._probe(Probe(num_steps=1), ["a", "b"], 3).steps[0].calls
            self._replay = learn_replay(steps, self.family.guidance_scale)
            skip = {self._replay.latents, self._replay.timestep}
            self._layout = tuple(
                {name: learn(name, first.arguments[name], second.arguments[name]) for name in first.arguments if name not in skip}
                for first, second in zip(one, two, strict=True)
            )
        return self._layout, self._replay

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, each distinct one once: what the denoiser's first call is told is the conditioning.

        Prompts are encoded one by one, so that a prompt's conditioning never depends on its batch mates, to the last bit.

        Args:
            prompts: Texts; repetition costs nothing.

        Returns:
            Conditioning of ``len(prompts)`` samples.
        """
        layout, _ = self._learn()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                call = self._probe(Probe(num_steps=1, num_calls=1), [prompt], self.num_steps).calls[0]
                self._encoded[prompt] = tuple(
                    leaf for name, spec in layout[0].items() for leaf in split(name, spec, call.arguments[name], 1)
                )
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        return stack(layout, [self._encoded[prompt] for prompt in distinct], index)

    def sigmas(self, num_steps: int | None = None) -> Tensor:
        """Return the grid of the pipeline's own scheduler, ``[steps + 1]`` float32 on the CPU."""
        num = self.num_steps if num_steps is None else num_steps
        if num not in self._grids:
            # A probe of no steps leaves as soon as the schedule is known.
            self._grids[num] = self._probe(Probe(num_steps=0), ["a"], num).sigmas.float().cpu()
        return self._grids[num]

    def rollout(
        self,
        cond: Conditioning,
        plan: Plan,
        *,
        x_init: Tensor,
        noise: NoiseSource,
        start: int = 0,
        batch_size: int | None = None,
    ) -> Trajectory:
        """Run a plan through the pipeline's own ``__call__``.

        Args:
            cond: Conditioning of ``batch`` samples.
            plan: One kernel for each step of the schedule.
            x_init: State at ``sigmas[start]``, ``[batch, *event]`` float32.
            noise: Standard normal draws for a step, ``[batch, *event]``.
            start: Resume in the middle of the schedule.
            batch_size: Samples of one call; None for all.

        Returns:
            The trajectory; latents and log-probs are float32 whatever the denoiser computes in.

        Raises:
            ValueError: If sizes do not fit, or the pipeline edits its latents between steps.
        """
        if x_init.shape != (len(cond), *self.event_shape):
            raise ValueError(f"x_init: got shape {tuple(x_init.shape)}, needed {(len(cond), *self.event_shape)}")
        if not 0 <= start < plan.num_steps:
            raise ValueError(f"start: got {start}, needed a step in [0, {plan.num_steps})")
        finals, tables, sigmas = [], [], torch.empty(0)
        drawn: dict[int, Tensor] = {}

        def part_noise(rows: Tensor) -> NoiseSource:
            def source(step: int) -> Tensor:
                if step not in drawn:
                    drawn[step] = noise(step)
                return drawn[step][rows].to(self.device)

            return source

        for rows in torch.arange(len(cond)).split(batch_size or len(cond)):
            driver = _Rollout(plan, x_init[rows].to(self.device, torch.float32), part_noise(rows), start, self.dtype)
            arguments = {
                **self.family.arguments,
                **self.family.embeds(cond.take(rows)),
                "num_inference_steps": plan.num_steps,
                "latents": driver.x.to(self.dtype),
                "output_type": "latent",
            }
            with installed(self.pipe, self.family.denoiser, self.denoiser, driver), torch.no_grad():
                self.pipe(**arguments)
            driver.check()
            finals.append(driver.x)
            sigmas = driver.sigmas
            for table in driver.tables:
                tables.append(_moved(table, int(rows[0])))
        transitions = Transitions.concatenate(tables) if tables else Transitions.empty(finals[0])
        self._remember(plan.num_steps, start, sigmas)
        return Trajectory(x_init=x_init, x0=torch.cat(finals), sigmas=self.sigmas(plan.num_steps), transitions=transitions)

    def _remember(self, num_steps: int, start: int, sigmas: Tensor) -> None:
        if start == 0:
            self._grids.setdefault(num_steps, sigmas.float().cpu())

    def _timestep(self, sigma: Tensor) -> Tensor:
        """Map noise levels to the denoiser's timesteps: float32 arithmetic in diffusers' own order, so that recorded ones come out again."""
        _, replay = self._learn()
        timestep = sigma.float() * replay.slope
        return timestep + replay.offset if replay.offset else timestep

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, role: str = CURRENT) -> Tensor:
        """Replay the denoiser on other latents.

        Args:
            x: ``[batch, *event]`` float32.
            sigma: Noise level, ``[batch]`` or 0-dim.
            cond: Conditioning of ``batch`` samples.
            role: Version of the network; only ``current`` carries gradient.

        Returns:
            Velocity ``[batch, *event]`` float32, guidance included.
        """
        _, replay = self._learn()
        arguments = cond.arguments()[0]
        arguments[replay.latents] = torch.cat([x.to(self.dtype)] * replay.copies)
        timestep = self._timestep(torch.as_tensor(sigma, device=x.device)).expand(len(x))
        arguments[replay.timestep] = timestep.repeat(replay.copies)
        with self.roles.use(role) as other, nullcontext() if role == CURRENT else torch.no_grad():
            output = (self.module if other is None else other)(**arguments)
        return replay.combine(output[0] if isinstance(output, tuple) else output.sample).float()

    def decode(self, x: Tensor, *, batch_size: int = 64) -> Tensor:
        """Decode latents ``[batch, *event]`` to images ``[batch, 3, h, w]`` in [0, 1], float32."""
        with torch.no_grad():
            return torch.cat([self.family.decode(self.pipe, part.to(self.dtype)).float() for part in x.split(batch_size)])

    def save(self, folder: Path, role: str = CURRENT) -> None:
        """Write a role: LoRA through the pipeline's own ``save_lora_weights``, full weights through ``save_pretrained``.

        The file is loaded back and compared before it takes its name.

        Raises:
            RuntimeError: If what was written does not behave like what was trained.
        """
        lora_files.save(self, folder, role)

    def load_lora(self, folder: Path) -> None:
        """Load a LoRA file into ``current``, for evaluation and sampling."""
        lora_files.load(self, folder)


def _moved(table: Transitions, first: int) -> Transitions:
    """Number a batch's samples as rows of the whole rollout."""
    return Transitions(**{**vars(table), "sample": table.sample + first})


class _Rollout:
    """Drives one call of the pipeline by a plan; float32 state inside, the pipeline sees a cast copy."""

    def __init__(self, plan: Plan, x: Tensor, noise: NoiseSource, start: int, dtype: torch.dtype) -> None:
        self.plan, self.x, self.noise, self.start, self.dtype = plan, x, noise, start, dtype
        self.sigmas = torch.empty(0)
        self.tables: list[Transitions] = []
        self._seen: list[Tensor] = []
        self._shown = x.to(dtype)

    def begin(self, sigmas: Tensor) -> None:
        """Check the plan against the schedule."""
        self.plan.check(len(sigmas) - 1 + self.start)
        self.sigmas = sigmas.float().cpu()

    def call(self, arguments: dict[str, Any]) -> None:
        """Let the denoiser work."""

    def answer(self, output: Any) -> None:
        """Let the pipeline combine it."""

    def step(self, index: int, model_output: Tensor, sample_seen: Tensor) -> Tensor:
        """Apply the plan's kernel and keep the transition if it is trained."""
        # Compared on the device and read after the rollout: no wait in each step.
        self._seen.append((sample_seen != self._shown).any())
        now, then = self.sigmas[index - self.start], self.sigmas[index - self.start + 1]
        step = self.plan.steps[index]
        velocity = model_output.float()
        law = step.kernel(self.x, velocity, now, then)
        x_next = law.mean if step.kernel.is_deterministic else sample(law, self.noise(index))
        if step.is_trained:
            self.tables.append(transition_rows(index, self.x, x_next, velocity, law.mean, law.std, now, then))
        self.x = x_next
        self._shown = x_next.to(self.dtype)
        return self._shown

    def check(self) -> None:
        """Refuse a pipeline that edited its latents between steps."""
        edited = [self.start + i for i, different in enumerate(self._seen) if bool(different)]
        if edited:
            raise ValueError(
                f"the pipeline edited its latents before step {edited[0]} (a callback, inpainting or a custom loop); "
                "its transitions would not be those of the plan"
            )


__all__ = ["Conditioning", "Family", "FlowPipeline", "Left", "LoRA"]
