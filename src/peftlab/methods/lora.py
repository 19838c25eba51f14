"""LoRA: low-rank adapters beside linear layers, by peft, with what peft offers on it by setting.

h = W0 x + (alpha / rank) B A x, with A (rank, in) random, B (out, rank) zero at the start, W0 frozen. With rsLoRA the scale
is alpha / sqrt(rank). With DoRA, h = m (W0 + s B A) x / ||W0 + s B A||, the norm of each row, m (out) trained too.

`init` says how A and B start. pissa, olora, corda and lora_ga start with a B A that is not zero and take it out of W0, so
that the model still answers as the base; the originals are kept in host memory, and what is saved is a plain LoRA of twice
the rank for the untouched base. eva, corda and lora_ga look at rows of the run first.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; peft `tuners/lora/`. DoRA: arXiv 2402.09353; rsLoRA: 2312.03732;
PiSSA: 2404.02948; OLoRA: 2406.01775; EVA: 2410.07170; CorDA: 2406.05223; LoRA-GA: 2407.05000; LoRA+: 2402.12354; LoRA-FA:
2308.03303.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

_CHANGING_BASE = ("pissa", "olora", "corda", "lora_ga")
_STARTS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "eva", "corda", "lora_ga")
_FROM_DATA = ("eva", "corda", "lora_ga")
_NO_LOFTQ = (
    "LoftQ is not offered: peft 0.21 makes it with bitsandbytes on a CUDA device, and the model it leaves holds quantised"
    " weights, so that no adapter on the untouched base would answer as it does; pissa and olora start from W0 too"
)
_RANGE = re.compile(r"\s*(\d+)\s*-\s*(\d+)\s*")

IN_TOWERS = True
"""It can adapt one part of a model beside others (`adapters[].scope`)."""

RATE_TO_LORA = 1.0
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(_Settings):
    """What can be set on LoRA."""

    rank: int = Field(default=8, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=16, gt=0)
    """Scale of the update: alpha / rank."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: str | tuple[str, ...] = "both"
    """A target group of `peftlab list targets`, a role such as attention.query, a module name, or a list of these."""
    layers: tuple[int, ...] | None = None
    """Layers whose modules are adapted, counted from 0 in each stack: "2-5" (both included), a list of single ones, or one;
    None is all. Targets outside the stacks stay."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Target group, role, module name or path to a rank of its own; the narrower one decides."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """As rank_pattern, for alpha."""
    use_rslora: bool = False
    """Whether the scale is alpha / sqrt(rank)."""
    use_dora: bool = False
    """Whether magnitude and direction are apart (DoRA): one trained number more for each output feature."""
    init: str = "default"
    """How A and B start: default, gaussian, orthogonal, pissa, pissa_niter_N (a fast SVD of N iterations), olora, eva, corda
    or lora_ga."""
    init_batches: int | None = Field(default=None, ge=1)
    """Batches that eva, corda and lora_ga look at; None is 8."""
    corda_method: Literal["ipm", "kpm"] | None = None
    """What corda keeps: ipm trains the directions the rows use most, kpm those they use least; None is ipm."""
    lora_ga_direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] | None = None
    """Which singular vectors of the gradient A and B take; None is ArB2r."""
    lora_ga_scale: Literal["stable", "weight_svd", "gd_scale", "unit"] | None = None
    """How lora_ga scales them; None is stable."""
    modules_to_save: tuple[str, ...] = ()
    """Further modules that are trained whole beside the adapter, by name or path, such as norm."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base train too: none, all, or those of adapted modules; they come back when it is removed."""
    optimizer: Literal["adamw", "lora_plus", "lora_fa"] = "adamw"
    """adamw, lora_plus (B learns faster than A) or lora_fa (A is frozen, B's gradient is projected)."""
    lora_plus_ratio: float | None = Field(default=None, ge=1)
    """B's learning rate over A's, for lora_plus; None is 16."""

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets or not all(targets):
            raise ValueError("at least one target is needed")
        return targets

    @field_validator("layers", mode="before")
    @classmethod
    def _spelt_out(cls, layers: Any) -> Any:
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = (layers,)
        if isinstance(layers, str):
            found = _RANGE.fullmatch(layers)
            if not found or int(found[1]) > int(found[2]):
                raise ValueError(
                    'must be a range "FIRST-LAST" with FIRST <= LAST, a list of layers, or one layer'
                )
            layers = tuple(range(int(found[1]), int(found[2]) + 1))
        return layers

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError("layers are counted from 0, each is named once, and at least one is needed")
        return None if layers is None else tuple(sorted(layers))

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _whole_names(cls, pattern: Any) -> Any:
        return _flat(pattern) if isinstance(pattern, dict) else pattern

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive(cls, pattern: dict[str, float]) -> dict[str, float]:
        wrong = [name for name, value in pattern.items() if not name or value <= 0]
        if wrong:
            raise ValueError(f"'{wrong[0]}' must have a value above 0")
        return pattern

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _one_or_several(cls, modules: Any) -> Any:
        return (modules,) if isinstance(modules, str) else modules

    @field_validator("init")
    @classmethod
    def _known_start(cls, init: str) -> str:
        if init == "loftq":
            raise ValueError(_NO_LOFTQ)
        if init not in _STARTS[:4] + _STARTS[5:] and not re.fullmatch(r"pissa_niter_\d+", init):
            raise ValueError(f"must be one of {', '.join(_STARTS)}")
        return init

    @model_validator(mode="after")
    def _all_take_effect(self) -> Settings:
        needs = {
            "init_batches": (self.init in _FROM_DATA, f"init is one of {', '.join(_FROM_DATA)}"),
            "corda_method": (self.init == "corda", "init is corda"),
            "lora_ga_direction": (self.init == "lora_ga", "init is lora_ga"),
            "lora_ga_scale": (self.init == "lora_ga", "init is lora_ga"),
            "lora_plus_ratio": (self.optimizer == "lora_plus", "optimizer is lora_plus"),
        }
        for name, (holds, condition) in needs.items():
            if getattr(self, name) is not None and not holds:
                raise ValueError(f"{name} has an effect only where {condition}")
        if self.optimizer == "lora_fa" and self.use_dora:
            raise ValueError(
                "optimizer lora_fa pairs A with B, and peft 0.21's takes DoRA's magnitude for one of them: set"
                " use_dora=false, or another optimizer"
            )
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init orthogonal needs even ranks, not {odd[0]}")
        return self


def _flat(pattern: dict[Any, Any]) -> dict[str, Any]:
    """A pattern by whole names: a config reads the dots of attention.query as keys inside keys."""
    flat: dict[str, Any] = {}
    for name, value in pattern.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{rest}" if rest else str(name): number for rest, number in inner.items()}
    return flat


def trains_the_base(settings: Mapping[str, Any]) -> bool:
    """Whether tensors of the base are trained or changed, which half precision would round.

    Args:
        settings: The method's settings as a config has them.
    """
    return settings.get("bias", "none") != "none" or str(settings.get("init", "")).startswith(_CHANGING_BASE)


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Add LoRA to a base.

    Args:
        model: The base; its own tensors change only with pissa, olora, corda and lora_ga, or where biases train, and come
            back when the method is removed.
        family: The map of the base.
        settings: Rank, alpha, dropout, targets and the rest.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds A.

    Returns:
        The attachment; the model still answers as the base does.

    Raises:
        MethodError: A setting has no place in this model.
        TargetError: Targets, layers, patterns or modules match nothing in this model.
    """
    from peftlab.attaching.lora_attachment import LoraAttachment

    return LoraAttachment(model, family, settings, head=head, seed=seed)
