"""What a family says of its pipelines, and the settings that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowalign.pipelines import economy
from flowalign.pipelines.combine import After
from flowalign.pipelines.conditioning import Conditioning
from flowalign.pipelines.loading import check_device, load
from flowalign.pipelines.roles import LoRA

Arguments = Mapping[str, Any]

# What diffusers calls the projections of attention, in every model that it ships.
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0", "to_out", "to_qkv_mlp_proj"),  # the last of FLUX.2's single stream
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"),  # of the text beside the image
)
JOINT_ATTENTION = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""LoRA targets of transformers with a stream of text beside that of the image: the attention of both."""


def attention_targets(denoiser: nn.Module) -> tuple[str, ...]:
    """Name the projections of attention that a denoiser has, as LoRA targets.

    Raises:
        ValueError: If it has none under the names that diffusers uses.
    """
    named = {name: [layer for place, layer in denoiser.named_modules() if place.endswith(f".{name}")] for name in PROJECTIONS}
    # A name that is a list of layers elsewhere cannot be a target.
    found = tuple(name for name, layers in named.items() if layers and all(isinstance(layer, nn.Linear) for layer in layers))
    if not found:
        raise ValueError(
            f"pipeline.lora.targets: {type(denoiser).__name__} has none of {', '.join(PROJECTIONS)}; name its layers, or lora: null"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cannot be read off a recording.

    Attributes:
        denoiser: The pipeline's attribute that holds the denoiser.
        arguments: What every call of the pipeline gets: sizes, guidance, text length.
        targets: Default LoRA targets.
        untargeted: Last names of the attention layers that the default targets leave out.
        unused: Names of layers whose output nothing reads, so that no gradient ever reaches them: they are not trained.
        guidance_scale: The guidance among the arguments that combines outputs of the denoiser.
        negative_prompt: Passed once per sample; None for the pipeline's own default.
        afters: What may be done to a guided prediction and is not switched off; whether it is done is read off the recording.
        fix: From the recorded arguments of each denoiser call to such as do not depend on the length of the text; None where they do not.
        event_shape: Shape of the latents of one sample; None reads it off.
        embeds: From conditioning to the arguments of ``__call__`` that carry prompt embeddings; None lets the denoiser be told its
            conditioning while the pipeline believes in other texts.
        decode: From pipeline and latents to images in [0, 1]; None lets the pipeline's own ``__call__`` decode.
    """

    denoiser: str
    arguments: Arguments
    targets: tuple[str, ...]
    untargeted: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    afters: tuple[After, ...] = ()
    fix: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None
    event_shape: tuple[int, ...] | None = None
    embeds: Callable[[Conditioning], Arguments] | None = None
    decode: Callable[[DiffusionPipeline, Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """A model and how it is sampled and trained.

    Attributes:
        model: Folder, or hub id.
        num_steps: Denoising steps of rollouts.
        guidance_scale: Guidance in rollout and training.
        height: Pixels; None for the model's own size.
        width: Pixels; None for the model's own size.
        variant: Reads ``*.VARIANT.safetensors``, such as "fp16", for folders and hub models that have only those; null for the plain files.
        dtype: What the networks compute in; latents, log-probs and adapters stay float32.
        lora: Adapters to train; null trains all weights of the denoiser.
        gradient_checkpointing: Trade compute for memory in training.
        offload: Text encoders and autoencoder rest in main memory and are on the device only while they work; each prompt is encoded once.
        vae_slicing: Decode image by image, for less memory.
        vae_tiling: Decode large images tile by tile; seams are blended, so pixels change a little.
        compile: Compile each repeated block of the denoiser with ``torch.compile``; the first passes take a minute more.
        attention: Backend of attention by diffusers' name, such as "_native_cudnn" or "flash"; null for torch's own choice.
    """

    model: str
    num_steps: int = 10
    guidance_scale: float = 1.0
    height: int | None = None
    width: int | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoRA | None = field(default_factory=LoRA)
    gradient_checkpointing: bool = False
    offload: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    compile: bool = False
    attention: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no pipeline takes."""
        if self.num_steps < 1:
            raise ValueError(f"num_steps: got {self.num_steps}, needed at least 1")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, needed at least 0")

    @abstractmethod
    def kind(self) -> type[DiffusionPipeline]:
        """Return the pipeline's class."""

    @abstractmethod
    def family(self, pipe: Any) -> Family:
        """Say what cannot be read off.

        Raises:
            ValueError: If this model cannot do what the settings say.
        """

    def guided(self, scale: float, pipe: Any) -> Self:
        """Return the settings with classifier-free guidance, as a teacher has it.

        Raises:
            ValueError: If the model is guided already, in another way.
        """
        return replace(self, guidance_scale=scale)

    def without(self) -> dict[str, Any]:
        """Name parts that are left out when the pipeline is loaded, and options of its constructor."""
        return {}

    def load(self, *, device: str | torch.device = "cpu") -> Any:
        """Load the bare pipeline; see ``build``."""
        check_device(self.dtype, device)
        pipe = load(self.kind(), self.model, dtype=getattr(torch, self.dtype), variant=self.variant, **self.without())
        if self.offload:
            getattr(pipe, self.family(pipe).denoiser).to(device)
        else:
            pipe = pipe.to(device)
        return self.thrifty(pipe)

    def thrifty(self, pipe: Any) -> Any:
        """Switch on what saves memory and time.

        Raises:
            ValueError: If this model cannot do it.
        """
        denoiser = getattr(pipe, self.family(pipe).denoiser)
        if self.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        economy.spare_autoencoder(pipe, slicing=self.vae_slicing, tiling=self.vae_tiling)
        if self.attention is not None:
            economy.set_attention(denoiser, self.attention)
        if self.compile:
            economy.compile_blocks(denoiser)
        return pipe

    def build(self, *, device: str | torch.device = "cpu", seed: int = 0) -> Any:
        """Load the model and put adapters on it.

        Args:
            device: Where to put it.
            seed: Seed of the adapters' first weights.

        Returns:
            A `flowalign.pipelines.base.FlowPipeline`.

        Raises:
            FileNotFoundError: If the model is nowhere.
            ValueError: If it is of another family, cannot make this size, or the device cannot compute in this precision.
        """
        from flowalign.pipelines.base import FlowPipeline

        pipe = self.load(device=device)
        return FlowPipeline(pipe, self.family(pipe), self.lora, num_steps=self.num_steps, seed=seed, offload=self.offload)

    def size(self, pipe: Any, *, unit: int, default: int, most: int | None = None) -> tuple[int, int]:
        """Return height and width in pixels.

        Args:
            pipe: The pipeline.
            unit: Both are multiples of it.
            default: The model's own size.
            most: Largest size; None for no limit.

        Raises:
            ValueError: If the model cannot make this size.
        """
        height, width = self.height or default, self.width or default
        for name, size in (("height", height), ("width", width)):
            if size % unit or size < unit or (most is not None and size > most):
                limit = "" if most is None else f" up to {most}"
                raise ValueError(f"pipeline.{name}: this model makes multiples of {unit} pixels{limit}, got {size}")
        return height, width
