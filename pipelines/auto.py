"""Any diffusers pipeline, flow or DDPM, worked out from recordings alone, checked against itself, and described."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from torch import nn

from flowalign.pipelines.base import FlowPipeline
from flowalign.pipelines.combine import After, LimitedNorm, Rescale, SameNorm
from flowalign.pipelines.family import Family, ModelConfig, attention_targets
from flowalign.pipelines.loading import index_of
from flowalign.pipelines.worked_out import describe, verify, work_out

DENOISERS = ("transformer", "unet")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A pipeline of any class; what is found is printed, and verified before anything else happens.

    Attributes:
        guidance_scale: Guidance, under the name that the pipeline has for it; 0 and 1 mean what they mean to the pipeline.
        negative_prompt: Where the pipeline takes one and is guided.
        arguments: Further arguments of every call of the pipeline.
    """

    negative_prompt: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def kind(self) -> type[DiffusionPipeline]:
        """Return the class that the model names.

        Raises:
            FileNotFoundError: If the model is nowhere; what to do is said.
            ValueError: If diffusers has none of that name.
        """
        name = index_of(self.model).get("_class_name", "")
        # diffusers imports its classes when they are asked for, so they are not among its variables.
        found = getattr(diffusers, name, None) if name in dir(diffusers) else None
        if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
            raise ValueError(f"pipeline.model: {self.model} is a {name!r}, which diffusers {diffusers.__version__} does not have")
        return found

    def family(self, pipe: Any) -> Family:
        """Read the names of the pipeline's parts and arguments.

        Raises:
            ValueError: If there is not one denoiser, or the pipeline takes no latents or no such argument.
        """
        takes = inspect.signature(type(pipe).__call__).parameters
        unknown = [name for name in ("prompt", "latents", "num_inference_steps", *self.arguments) if name not in takes]
        if unknown:
            raise ValueError(f"pipeline: {type(pipe).__name__} takes no argument {unknown[0]!r}; it takes {', '.join(takes)}")
        parts = [name for name in DENOISERS if isinstance(pipe.components.get(name), nn.Module)]
        if len(parts) != 1 or isinstance(pipe.components.get("transformer_2"), nn.Module):
            raise ValueError(f"pipeline: {type(pipe).__name__} has the parts {', '.join(pipe.components)}; needed one of {DENOISERS} alone")
        scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in takes), "guidance_scale")
        sizes: dict[str, Any]
        sizes = {"height": self.height, "width": self.width, scale: self.guidance_scale}
        arguments = {name: value for name, value in sizes.items() if name in takes and value is not None} | dict(self.arguments)
        guided = self.guidance_scale > 1 and "negative_prompt" in takes
        return Family(
            denoiser=parts[0],
            arguments=arguments,
            targets=attention_targets(pipe.components[parts[0]]),
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt if guided else None,
            afters=_afters(arguments),
        )

    def build(self, *, device: Any = "cpu", seed: int = 0) -> FlowPipeline:
        """Load, work out, verify and describe; see `ModelConfig.build`.

        Raises:
            ValueError: If the pipeline cannot be worked out; what was seen and what is missing is named.
        """
        flow: FlowPipeline = super().build(device=device, seed=seed)
        work_out(flow)
        verify(flow)
        print(describe(flow), file=sys.stderr)
        return flow


def _afters(arguments: Mapping[str, Any]) -> tuple[After, ...]:
    """Return what is known to be done to guided predictions, as far as the arguments do not switch it off."""
    share, limit = (float(arguments.get(name, 0.0)) for name in ("guidance_rescale", "cfg_normalization"))
    return (SameNorm(), *([Rescale(share)] if share > 0 else []), *([LimitedNorm(limit)] if limit > 0 else []))
