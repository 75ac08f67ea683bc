"""A diffusers pipeline as a trajectory generator: its own ``__call__`` drives, we watch, and replay what the denoiser was asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flowalign.core.plans import Plan
from flowalign.core.rollout import Ended, Noise, Take, Trajectory, explore
from flowalign.pipelines import features, guided, lora_files, watch
from flowalign.pipelines.combine import Guidance
from flowalign.pipelines.conditioning import Conditioning, Leaf, moved, num_bytes, split, stack
from flowalign.pipelines.economy import Resting, parts_beside
from flowalign.pipelines.family import Family
from flowalign.pipelines.packing import Packing, learn_packing
from flowalign.pipelines.record import Left, Probe, installed
from flowalign.pipelines.recorder import Recorder
from flowalign.pipelines.replay import Replay
from flowalign.pipelines.roles import CURRENT, REFERENCE, LoRA, Roles
from flowalign.pipelines.watch import Learnt

CACHE_BYTES = 4 * 2**30  # of encoded prompts, in the CPU's memory; SD3 takes 2 MB a prompt in half precision


class FlowPipeline:
    """A pipeline of any family behind one protocol: encode, rollout, velocity, decode, sigmas, save and its roles.

    Attributes:
        pipe: The diffusers pipeline.
        family: Its family.
        denoiser: The bare denoiser.
        module: What is called where gradients flow; training puts the wrapped (DDP) denoiser here.
        modules: The same for further trained roles that are networks of their own (all weights trained).
        roles: Versions of the denoiser.
        dtype: What the networks compute in.
        resting: Parts that are on the device only while they work.
        num_steps: Default number of steps.
    """

    def __init__(
        self, pipe: DiffusionPipeline, family: Family, lora: LoRA | None, *, num_steps: int, seed: int = 0, offload: bool = False
    ) -> None:
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self.pipe, self.family, self.num_steps = pipe, family, num_steps
        self.denoiser: nn.Module = getattr(pipe, family.denoiser)
        self.dtype: torch.dtype = next(self.denoiser.parameters()).dtype
        self.resting = Resting(parts_beside(pipe, family.denoiser) if offload else {}, self.device)
        if lora is None:
            # All weights are trained: half precision cannot hold updates of 1e-4 of a weight, so it is left to autocast.
            self.denoiser.float()
        self.roles = Roles(self.denoiser, lora, family.targets, seed=seed, unused=family.unused)
        self.module = self.denoiser
        self.modules: dict[str, nn.Module] = {}
        self._encoded: dict[str, tuple[Leaf, ...]] = {}  # the latest use last
        self._packing = None if family.event_shape is None else Packing(event=family.event_shape, given=family.event_shape)
        self._learnt: Learnt | None = None
        self._grids: dict[int, Tensor] = {}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._covered: dict[int, set[int]] = {}

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def rows_per_evaluation(self) -> int:
        """Rows that the denoiser computes for one velocity: 2 under guidance."""
        return sum(rule.copies for rule in self.learnt().replay.calls)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one sample, packed where the pipeline packs them."""
        return self.packing.event

    @property
    def packing(self) -> Packing:
        """How the pipeline takes latents."""
        if self._packing is None:
            self._packing = learn_packing(self)
        return self._packing

    def precision(self) -> AbstractContextManager[Any]:
        """Compute as rollout and training do: in half precision by autocast where all weights are trained."""
        if self.roles.lora is None and self.dtype != torch.float32:
            return torch.autocast(self.device.type, dtype=self.dtype)
        return nullcontext()

    def learnt(self) -> Learnt:
        """What two short recordings told: where the batch is, what the timestep is and how outputs are combined."""
        if self._learnt is None:
            with self.resting.awake(text=True):
                self._learnt = watch.learn_all(self)
        return self._learnt

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, each distinct one once (as long as 4 GiB hold them all): what the denoiser is told besides latents and noise level.

        Prompts are encoded one by one, so that a prompt's conditioning never depends on its batch mates, to the last bit.

        Args:
            prompts: Texts; repetition costs nothing.

        Returns:
            Conditioning of ``len(prompts)`` samples.

        Raises:
            ValueError: If there are no prompts, or the pipeline cannot be recorded (the reason is named).
        """
        if not prompts:
            raise ValueError("encode: needs at least one prompt, got none")
        layout = self.learnt().layout
        distinct = list(dict.fromkeys(prompts))
        # The text encoders are woken once for all new prompts, and not at all where there is none.
        with self.resting.awake(text=not self._encoded.keys() >= set(distinct)):
            for prompt in distinct:
                self._encoded[prompt] = self._encoded.pop(prompt) if prompt in self._encoded else self._encode(prompt)
        place = {prompt: row for row, prompt in enumerate(distinct)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        rows = [self._encoded[prompt] for prompt in distinct]
        # Prompts of one pipeline are about of one size.
        room = max(len(distinct), CACHE_BYTES // max(1, num_bytes(rows[0])))
        for prompt in list(self._encoded)[: max(0, len(self._encoded) - room)]:
            del self._encoded[prompt]
        return stack(layout, rows, index)

    def _encode(self, prompt: str) -> tuple[Leaf, ...]:
        layout, replay, _ = self.learnt()
        calls = watch.probe(self, Probe(num_steps=1, num_calls=len(replay.calls)), [prompt], self.num_steps).calls
        return tuple(
            leaf
            for specs, told in zip(layout, watch.fixed(self.family, calls), strict=True)
            for name, spec in specs.items()
            for leaf in moved(tuple(split(name, spec, told[name], 1)), "cpu")  # a GPU is too small for thousands
        )

    def sigmas(self, num_steps: int | None = None) -> Tensor:
        """Return the grid of the pipeline's own scheduler, ``[steps + 1]`` float32 on the CPU."""
        num = self.num_steps if num_steps is None else num_steps
        if num not in self._grids:
            # A probe of no steps leaves as soon as the schedule is known.
            stand_in = self._learnt.stand_in if self._learnt else None
            seen = watch.probe(self, Probe(num_steps=0), ["a"], num, encoder=stand_in(1) if stand_in else None)
            self._grids[num] = seen.sigmas.float().cpu()
        return self._grids[num]

    def rollout(
        self,
        cond: Conditioning,
        plan: Plan,
        *,
        x_init: Tensor,
        noise: Noise,
        start: int = 0,
        batch_size: int | None = None,
        role: str = CURRENT,
        ended: Ended | None = None,
    ) -> Trajectory:
        """Run a plan through the pipeline's own ``__call__``, left where the plan splits and resumed from the states that it left.

        Args:
            cond: Conditioning of ``batch`` samples.
            plan: One step for each of the schedule.
            x_init: At ``start`` 0 the standard normal noise that the pipeline takes as its first latents, else the state at
                ``sigmas[start]``; ``[batch, *event]`` float32.
            noise: Standard normal draws for a step, ``[batch * len(plan.drawn(step, start)), *event]``; asked once where something is drawn.
            start: Resume in the middle of the schedule.
            batch_size: Samples of one call; None for all.
            role: Version of the network that samples.
            ended: Called with final states as they come and their rows of ``x0``.

        Returns:
            The trajectory; latents and log-probs are float32 whatever the denoiser computes in. Its ``x0`` is what the pipeline decodes;
            a variance-preserving schedule may end a little above ``sigma`` 0, and the pipeline takes that for clean.

        Raises:
            ValueError: If sizes do not fit, or the pipeline does what a replay would not repeat (the reason is named).
        """
        if x_init.shape != (len(cond), *self.event_shape):
            raise ValueError(f"x_init: got shape {tuple(x_init.shape)}, needed {(len(cond), *self.event_shape)}")
        x_init, sigmas, replay = x_init.to(self.device, torch.float32), self.sigmas(plan.num_steps), self.learnt().replay
        with self.roles.use(role) as network:

            def walk(x: Tensor, seed: Tensor, start: int, stop: int, take: Take) -> Tensor:
                own = cond.take(seed)
                recorder = Recorder(
                    take,
                    x,
                    start=start,
                    stop=stop,
                    num_steps=plan.num_steps,
                    sigma=sigmas[start],
                    dtype=self.dtype,
                    replay=replay,
                    expected=own.arguments(),
                    is_told=self.learnt().stand_in is not None,
                )
                self._drive(network, own, recorder, plan.num_steps)
                return recorder.latents

            def finish(x: Tensor) -> Tensor:
                return replay.frame.shown(x, sigmas[-1])

            options: dict[str, Any] = {"start": start, "batch_size": batch_size, "kinds": cond.kinds(), "finish": finish, "ended": ended}
            return explore(walk, x_init, sigmas, plan, noise, **options)

    def _drive(self, network: nn.Module, cond: Conditioning, recorder: Recorder, num_steps: int) -> None:
        """Make one call of the pipeline."""
        stand_in, embeds = self.learnt().stand_in, self.family.embeds
        arguments = {
            **self.family.arguments,
            **(embeds(cond) if embeds else watch.texts(self.family, [""] * len(cond))),
            "num_inference_steps": num_steps,
            "latents": self.packing.unpacked(recorder.latents.to(self.dtype)),
            "output_type": "latent",
            "return_dict": False,
        }
        encode = stand_in(len(cond)) if stand_in else None
        latents = None
        with (
            installed(self.pipe, self.family.denoiser, network, recorder, encode),
            torch.no_grad(),
            self.precision(),
            suppress(Left),
        ):
            latents = self.pipe(**arguments)[0]
        recorder.check(latents)
        self._remember(num_steps, recorder)

    def _remember(self, num_steps: int, recorder: Recorder) -> None:
        """Keep what the denoiser was told at each level; calls that are left or resumed show parts of a schedule."""
        levels, timesteps = torch.stack(recorder.levels).to(self.device), torch.stack(recorder.timesteps)
        covered = self._covered.setdefault(num_steps, set())
        steps = range(recorder.start, recorder.stop)
        if len(steps) == num_steps:
            self._known[num_steps] = levels, timesteps
        elif not covered.issuperset(steps):
            new = torch.tensor([step - recorder.start for step in steps if step not in covered], device=self.device)
            before = self._known.get(num_steps, (levels[:0], timesteps[:0]))
            self._known[num_steps] = torch.cat([before[0], levels[new]]), torch.cat([before[1], timesteps[new]])
        covered.update(steps)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, role: str = CURRENT) -> Tensor:
        """Replay the denoiser on other latents.

        Args:
            x: ``[batch, *event]`` float32.
            sigma: Noise level, ``[batch]`` or 0-dim.
            cond: Conditioning of ``batch`` samples.
            role: Version of the network; only ``current`` and other roles that are trained carry gradient.

        Returns:
            Velocity ``[batch, *event]`` float32, guidance included.

        Raises:
            ValueError: If the sizes do not fit.
        """
        if x.shape != (len(cond), *self.event_shape):
            raise ValueError(f"x: got shape {tuple(x.shape)}, needed {(len(cond), *self.event_shape)}")
        if torch.is_grad_enabled() and self.roles.is_trained(role):
            with self.roles.use(role) as network:
                wrapped = self.module if network is self.roles.module else network
                return self.replayed(self.modules.get(role, wrapped), x, sigma, cond)
        # Not the wrapped module: DDP would talk to other ranks in a pass without gradient.
        with self.roles.use(role) as network, torch.no_grad():
            return self.replayed(network, x, sigma, cond)

    @property
    def rows_of_guidance(self) -> int:
        """Rows that ``guide`` computes: one where the combination is diffusers' usual one, else as many as ``velocity``."""
        rule = self.learnt().replay.combine
        return 1 if isinstance(rule, Guidance) and rule.after is None else self.rows_per_evaluation

    def guide(self, x: Tensor, sigma: Tensor, cond: Conditioning, conditional: Tensor) -> Tensor:
        """Return the reference's guided velocity where the conditional one is known; see `flowalign.pipelines.guided`."""
        return guided.guide(self, x, sigma, cond, conditional)

    def replayed(self, network: Callable[..., Any], x: Tensor, sigma: Tensor, cond: Conditioning, replay: Replay | None = None) -> Tensor:
        """Replay a network that is given, as it is, by this pipeline's own rules or others; see ``velocity``."""
        replay = self.learnt().replay if replay is None else replay
        levels = torch.as_tensor(sigma, device=x.device, dtype=torch.float32).expand(len(x))
        kinds = cond.kinds()
        if kinds is not None:
            return self._each_kind(network, x, levels, cond, kinds, replay)
        timestep = replay.timestep(levels, self._known_timesteps(x.device))
        shown = replay.frame.shown(x, levels)
        outputs: list[Tensor] = []
        with self.precision():
            for rule, arguments in zip(replay.calls, cond.arguments(), strict=True):
                arguments[rule.latents] = rule.show(shown)
                arguments[rule.timestep] = timestep.repeat(rule.copies)
                outputs += [part.to(replay.output_dtype) for part in rule.outputs(network(**arguments))]
            prediction = replay.combine(outputs)
        return replay.frame.velocity(prediction.float(), shown, levels)

    def _each_kind(
        self, network: Callable[..., Any], x: Tensor, levels: Tensor, cond: Conditioning, kinds: Tensor, replay: Replay
    ) -> Tensor:
        """Replay samples whose texts are of different lengths, those of one length at a time."""
        if isinstance(network, FSDPModule):
            raise ValueError(
                "prompts: this pipeline does not pad its texts to one length, so that processes that share weights would make different numbers of "
                "passes; use prompts of one length, or leave train.shard false"
            )
        rows = [(kinds == kind).nonzero().squeeze(1).to(x.device) for kind in kinds.unique()]
        made = [self.replayed(network, x[some], levels[some], cond.take(some), replay) for some in rows]
        return torch.cat(made)[torch.argsort(torch.cat(rows))]

    def look(self, x: Tensor, sigma: Tensor, cond: Conditioning, role: str = REFERENCE) -> tuple[Tensor, Tensor]:
        """Return the velocity and what the denoiser makes of latents on its way; see `flowalign.pipelines.features`."""
        return features.look(self, x, sigma, cond, role)

    def tap(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, places: Sequence[float | str], *, whole: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return what blocks of the reference make of latents, and if ``whole`` its velocity; see `flowalign.pipelines.features`."""
        return features.tap(self, x, sigma, cond, places, whole=whole)

    def ends(self, num_steps: int) -> tuple[float, float]:
        """Return what the pipeline's first noise is multiplied by to give the state at ``sigmas(num_steps)[0]``, and the last state to give its latents.

        Both are 1 for flows.
        """
        frame, sigmas, one = self.learnt().replay.frame, self.sigmas(num_steps), torch.ones(1)
        return float(frame.state(one, sigmas[0])), float(frame.shown(one, sigmas[-1]))

    @property
    def known_levels(self) -> tuple[float, float]:
        """The least noisy and the noisiest level that the denoiser was trained at; 0 and 1 for flows."""
        return self.learnt().replay.frame.known

    def guided(self, family: Family) -> FlowPipeline:
        """Return the same pipeline and roles called with other settings, such as guidance; nothing is copied."""
        view = copy.copy(self)
        view.family, view._learnt = family, None
        view._encoded, view._grids, view._known, view._covered = {}, {}, {}, {}
        return view

    def _known_timesteps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self._known:
            return torch.empty(0, device=device), torch.empty(0, device=device)
        levels, timesteps = zip(*self._known.values(), strict=True)
        return torch.cat(levels), torch.cat(timesteps)

    def decode(self, x: Tensor, *, batch_size: int = 64) -> Tensor:
        """Decode latents ``[batch, *event]`` to images ``[batch, 3, h, w]`` in [0, 1], float32."""
        decode = self.family.decode
        with torch.no_grad(), self.resting.awake(images=True):
            return torch.cat(
                [(decode(self.pipe, part.to(self.dtype)) if decode else watch.decode(self, part)).float() for part in x.split(batch_size)]
            )

    def save(self, folder: Path, role: str = CURRENT, *, notes: Mapping[str, str] | None = None) -> None:
        """Write a role: LoRA through the pipeline's own ``save_lora_weights``, full weights through ``save_pretrained``.

        The files are loaded back and compared, by weights, velocities and pixels, before they take their name: a LoRA as a further adapter of the
        live network; of full weights the denoiser as a network of its own, and the parts beside it by weights alone.

        Args:
            folder: Where to.
            role: Version of the network.
            notes: Written into the metadata of a LoRA file: base model, recipe, seed, scores.

        Raises:
            RuntimeError: If what was written does not behave like what was trained.
        """
        lora_files.save(self, folder, role, notes)

    def load_lora(self, folder: Path) -> None:
        """Load a LoRA file into ``current``, for evaluation and sampling."""
        lora_files.load(self, folder)


__all__ = ["Conditioning", "Family", "FlowPipeline", "LoRA"]
