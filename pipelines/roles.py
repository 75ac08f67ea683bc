"""Roles: named versions of one network. Each is the base plus at most one adapter, or a frozen full copy."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

CURRENT, REFERENCE = "current", "reference"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters (Hu et al., 2021).

    Attributes:
        rank: Rank r.
        alpha: The update is scaled by alpha / rank.
        targets: Names of the linear layers that get one; None for the family's default.
        init: "gaussian" draws A from a normal and leaves B at 0; True is peft's default.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    init: Literal["gaussian", "default"] = "gaussian"

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be meant."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora: got rank {self.rank} and alpha {self.alpha}, needed a rank of at least 1 and a positive alpha")


class Roles:
    """The versions of one denoiser.

    With LoRA, every role but ``reference`` is an adapter on the one module, and ``reference`` is the module with its adapters off: the
    base, bit for bit. Without LoRA, ``current`` is the module and the others are frozen copies.

    Attributes:
        module: The denoiser.
        lora: Its adapters' settings; None if all weights are trained.
        unused: Layers that no gradient ever reaches: they get no adapter, and their weights are not trained.
        names: The roles, ``current`` first. With LoRA ``reference`` is always among them.
        active: The role that the module acts as right now; only ``use`` changes it.
    """

    def __init__(
        self, module: nn.Module, lora: LoRA | None, targets: tuple[str, ...], *, seed: int = 0, unused: tuple[str, ...] = ()
    ) -> None:
        self.module, self.lora, self.unused = module, lora, unused
        self._copies: dict[str, nn.Module] = {}
        self._trained = {CURRENT}
        self._layers: dict[str, LoraLayer] = {}
        self._config = None if lora is None else _peft_config(module, lora, lora.targets or targets, unused)
        self.active = CURRENT
        self._guest: str | None = None
        if lora is not None and not isinstance(module, PeftAdapterMixin):
            raise ValueError(
                f"pipeline.lora: diffusers puts no adapters on a {type(module).__name__}; set pipeline.lora to null to train all weights"
            )
        self._train_all(module, lora is None)
        if self._config is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module.add_adapter(self._config, adapter_name=CURRENT)
            self._layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
            self._widen(CURRENT)
        self.names = [CURRENT] if lora is None else [CURRENT, REFERENCE]
        self._select(CURRENT)

    def _train_all(self, module: nn.Module, trained: bool) -> None:
        """Make all weights trainable or none; DDP waits for the gradient of each that is, so those that never get one are not."""
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained and not is_within(name, self.unused))

    def _widen(self, name: str) -> None:
        for parameter in self._adapter(name).values():
            # Adapters are trained in float32 whatever the base is in: bf16 cannot hold updates of 1e-4 of a weight.
            parameter.data = parameter.data.float()
        self.module.eval()  # layers that peft has just made are in training mode

    def _adapter(self, name: str) -> dict[str, nn.Parameter]:
        """Parameters of an adapter under the names that they have in a file."""
        found: dict[str, nn.Parameter] = {}
        for place, layer in self._layers.items():
            found[f"{place}.lora_A.weight"] = layer.lora_A[name].weight
            found[f"{place}.lora_B.weight"] = layer.lora_B[name].weight
        return found

    def _check(self, name: str) -> None:
        if name not in (*self.names, self._guest):
            raise ValueError(f"role {name!r}: not there (known: {', '.join(self.names)}); add it first")

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that make a role differ from the base (with LoRA) or all its parameters."""
        self._check(name)
        if self.lora is not None:
            return dict(self._adapter(name)) if name != REFERENCE else {}
        return dict((self.module if name == CURRENT else self._copies[name]).named_parameters())

    def trainable_parameters(self, name: str = CURRENT) -> list[nn.Parameter]:
        """Return what an optimizer moves: the parameters of a role that is trained."""
        own = self.parameters(name)
        return [value for key, value in own.items() if isinstance(value, nn.Parameter) and not is_within(key, self.unused)]

    def is_trained(self, name: str) -> bool:
        """Tell whether a role carries gradient."""
        return name in self._trained

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that carry an adapter; without LoRA all linear layers."""
        if self.lora is not None:
            return tuple(self._layers)
        return tuple(name for name, layer in self.module.named_modules() if isinstance(layer, nn.Linear))

    @property
    def num_layers(self) -> int:
        """Number of layers that are trained; see ``layers``."""
        return len(self.layers)

    def add(self, name: str, *, trained: bool = False) -> None:
        """Add a role as a copy of ``current``; ``reference`` is the base itself with LoRA.

        Args:
            name: Its name.
            trained: Whether it carries gradient, beside ``current``; else it is frozen.

        Raises:
            ValueError: If the name has a dot, which separates module names.
        """
        if name in self.names:
            return
        if "." in name:
            raise ValueError(f"role {name!r}: a name without dots is needed")
        if trained:
            self._trained.add(name)
        if self.lora is None:
            self._copies[name] = copy.deepcopy(self.module)
            self._train_all(self._copies[name], trained)
        else:
            # The fork keeps torch's global generator out of it: these first weights are overwritten at once.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
                self.module.add_adapter(self._config, adapter_name=name)
            self._widen(name)
        self.names.append(name)
        self.blend(name, 0.0)
        self._select(self.active)

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """Move a role towards ``current``: ``role <- decay * role + (1 - decay) * current``, factor by factor.

        ``reference`` and ``current`` itself stay; decay 0 copies exactly.
        """
        if name in (CURRENT, REFERENCE):
            return
        source = self.parameters(CURRENT)
        for key, value in self.parameters(name).items():
            value.copy_(source[key]) if decay == 0 else value.lerp_(source[key], 1 - decay)

    def _select(self, name: str) -> None:
        self.active = name
        for layer in self._layers.values():
            layer.enable_adapters(name != REFERENCE)
            if name != REFERENCE:
                layer.set_adapter([name])
        # peft makes the selected adapter trainable and the others not; here those that are trained always are: a backward pass skips
        # whatever is frozen at that moment, also if it was not when its forward pass was done.
        for role in self.names:
            if self.lora is not None and role != REFERENCE:
                for parameter in self._adapter(role).values():
                    parameter.requires_grad_(role in self._trained)

    def memory(self) -> dict[str, int]:
        """Return the bytes that each role costs: "base" the frozen weights, and for each role what it adds.

        A trained role adds its weights, their gradient and AdamW's two moments, all in float32; one that follows it its weights alone.
        """
        added: dict[str, int] = {}
        for name in self.names:
            size = sum(value.numel() * value.element_size() for value in self.parameters(name).values())
            added[name] = 4 * size if name in self._trained else size
        if self.lora is None:
            return added
        total = sum(value.numel() * value.element_size() for value in self.module.parameters())
        adapters = sum(value.numel() * value.element_size() for name in self.names for value in self.parameters(name).values())
        return {"base": total - adapters, **{name: size for name, size in added.items() if name != REFERENCE}}

    def network(self, name: str) -> nn.Module:
        """Return the module that a role is computed by: the one, or with all weights trained its copy."""
        self._check(name)
        return self.module if self.lora is not None or name == CURRENT else self._copies[name]

    def networks(self) -> list[nn.Module]:
        """Return every module that there is: the one, and with all weights trained the copies."""
        return [self.module, *self._copies.values()]

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """Make the module act as a role, and afterwards as before; yields the network to call."""
        self._check(name)
        if self.lora is None:
            yield self.network(name)
            return
        before = self.active
        if name == before:
            yield self.module
            return
        self._select(name)
        try:
            yield self.module
        finally:
            self._select(before)

    @contextmanager
    def guest(self, name: str, load: Callable[[], None]) -> Iterator[None]:
        """Have a further adapter on the module for as long as the block; ``use`` takes its name meanwhile, and nothing of it stays.

        Args:
            name: The adapter's.
            load: Puts it there, on the layers that have one.
        """
        before = self.active
        module: Any = self.module
        try:
            # The fork keeps torch's global generator out of it: first weights are overwritten at once.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
                load()
            self._guest = name
            self._select(before)
            module.eval()
            yield
        finally:
            self._guest = None
            self._select(before)  # peft chooses another where the active adapter is deleted
            if name in module.peft_config:
                module.delete_adapters(name)
            self._select(before)

    def lora_state_dict(self, name: str) -> dict[str, Tensor]:
        """Return a role's adapter in peft's layout, as ``save_lora_weights`` wants it.

        Raises:
            ValueError: If the role has none.
        """
        self._check(name)
        if name == REFERENCE:
            raise ValueError("role 'reference' is the base itself: it has no adapter to write")
        return get_peft_model_state_dict(self.module, adapter_name=name)

    def lora_metadata(self) -> dict[str, Any]:
        """Return the adapter's configuration for the file's metadata, so that rank and alpha survive."""
        assert self._config is not None
        settings = self._config.to_dict()
        settings["target_modules"] = sorted(settings["target_modules"])
        return {key: value for key, value in settings.items() if isinstance(value, str | int | float | bool | list | dict | type(None))}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of every role but the reference, for an exact resume."""
        return {name: self.parameters(name) for name in self.names if name != REFERENCE}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what ``state_dict`` gave; roles that are not there yet are added.

        Raises:
            ValueError: If roles or tensors are missing or have other shapes.
        """
        absent = [name for name in self.names if name != REFERENCE and name not in state]
        if absent:
            raise ValueError(f"the stored roles are {', '.join(state)}; missing {', '.join(absent)}")
        for name, tensors in state.items():
            self.add(name)
            self.load(name, tensors)

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the tensors of one role.

        Raises:
            ValueError: If they are not the role's.
        """
        mine = self.parameters(name)
        if mine.keys() != tensors.keys():
            odd = sorted(set(mine) ^ set(tensors))
            raise ValueError(
                f"role {name!r}: the stored tensors are not those of this model ({len(odd)} do not match, for example {odd[0]})"
            )
        for key, value in mine.items():
            if value.shape != tensors[key].shape:
                raise ValueError(f"role {name!r}, {key}: stored shape {tuple(tensors[key].shape)}, needed {tuple(value.shape)}")
        for key, value in mine.items():
            value.copy_(tensors[key])


def is_within(name: str, layers: tuple[str, ...]) -> bool:
    """Tell whether a name is that of one of the layers, or of a part of one."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def _peft_config(module: nn.Module, lora: LoRA, targets: tuple[str, ...], unused: tuple[str, ...]) -> LoraConfig:
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            endings = sorted({".".join(name.split(".")[-num:]) for name in linear for num in (1, 2)})
            near = difflib.get_close_matches(target, endings, n=5, cutoff=0.4) or endings[:20]
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; there are {', '.join(near)}")
    matched = [name for name in linear if any(name == target or name.endswith(f".{target}") for target in targets)]
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(targets),
        exclude_modules=[name for name in matched if is_within(name, unused)] or None,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        lora_dropout=0.0,  # dropout would make the rollout's network another one than the trained one
    )
