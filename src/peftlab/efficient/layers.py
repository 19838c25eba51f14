"""LoRA and AdaLoRA layers under the efficient fine-tuning document's names and signatures; peft's layers do the work.

LoRA: h = W0 x + (alpha / rank) (B A x + c), with B = 0 and c = 0 at the start; c is there with `bias=True` only.
AdaLoRA: h = W0 x + alpha / (rank + 1e-5) P Lambda Q x, with Lambda = 0 at the start; the 1e-5 is peft's. Without a base
layer, W0 is left out and only the update is given.

`nn.MultiheadAttention` reads the weight of its `out_proj` and never calls it. peft's own layer for it adapts `in_proj` too,
adds the update of `out_proj` twice (0.21.2) and rounds the base anew in every pass; so `out_proj` gets a layer here whose
weight, where it is read, is W0 + (alpha / rank) B A.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; Zhang et al. 2023, arXiv 2303.10512, section 3.1; peft
`tuners/lora/layer.py`, `tuners/adalora/layer.py`.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftlab.attaching.attachment import ADAPTER
from peftlab.errors import ConfigError, MethodError, UnknownNameError

ALLOCATIONS = ("uniform", "importance", "magnitude")
"""How AdaLoRA ranks its singular values against each other."""
_OWN = ("lora_A", "lora_B", "lora_E")
"""The parts of peft's layers that hold what is trained."""


class _Nothing(nn.Module):
    """Stands where peft's layers expect the layer they adapt; puts out zeros."""

    def __init__(self, input_dimension: int, output_dimension: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_dimension, output_dimension  # the names that peft looks for
        for name in ("weight", "bias"):  # tell peft the device and the dtype, and that a bias has its place
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros of the output's shape."""
        return x.new_zeros(*x.shape[:-1], self.output_size)


class LoRALayer(Linear):  # type: ignore[misc]
    """A low-rank update: x (..., in) to (alpha / rank) (B A x + c) (..., out).

    Args:
        input_dimension: Features of the input.
        output_dimension: Features of the output.
        rank: Rows of A, columns of B.
        alpha: Scale of the update: alpha / rank.
        dropout_probability: Dropout on the update's input while training.
        bias: Whether the update has a bias c of its own; the base's bias stays frozen in any case.
        base_layer: What is updated; None gives the update alone.

    Raises:
        ConfigError: A size is below 1, alpha is not positive, or dropout is not in [0, 1).

    Example:
        >>> LoRALayer(input_dimension=8, output_dimension=4, rank=2)(torch.ones(2, 3, 8)).abs().max().item()
        0.0
    """

    def __init__(
        self,
        input_dimension: int,
        output_dimension: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.1,
        bias: bool = False,
        *,
        base_layer: nn.Module | None = None,
    ) -> None:
        _check(rank, alpha, dropout_probability, input_dimension, output_dimension)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout_probability,
            lora_bias=bias,
            fan_in_fan_out=isinstance(base_layer, Conv1D),
        )
        base = base_layer or _Nothing(input_dimension, output_dimension)
        super().__init__(
            base,
            ADAPTER,
            config=config,
            r=rank,
            lora_alpha=alpha,
            is_target_conv_1d_layer=config.fan_in_fan_out,
        )
        _settle(self, base)

    def share(self, layer: LoRALayer) -> None:
        """Use another layer's update from now on: the same tensors, not a copy.

        Args:
            layer: The layer whose update it is.

        Raises:
            MethodError: The two differ in features.
        """
        own, other = (self.in_features, self.out_features), (layer.in_features, layer.out_features)
        if own != other:
            raise MethodError(
                f"one LoRA can be shared by layers of the same features; it has {other}, this layer {own}"
            )
        layer.to(self.get_base_layer().weight.device)
        for part in ("lora_A", "lora_B", "lora_dropout", "scaling", "r", "lora_alpha", "lora_bias"):
            getattr(self, part)[ADAPTER] = getattr(layer, part)[ADAPTER]


class LoRALinear(LoRALayer):
    """A frozen linear layer and its low-rank update: x (..., in) to W0 x + b + (alpha / rank) (B A x + c) (..., out).

    Args:
        original_layer: An `nn.Linear`, or transformers' Conv1D; it is frozen, and kept as `original_layer`.
        rank: Rank of the update.
        alpha: Scale of the update: alpha / rank.
        dropout_probability: Dropout on the update's input while training.
        bias: Whether the update has a bias of its own.

    Raises:
        ConfigError: A value is out of its range.
        MethodError: The layer is of another kind, or quantised.
    """

    def __init__(
        self,
        original_layer: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.1,
        bias: bool = False,
    ) -> None:
        features = linear_features(original_layer)
        super().__init__(*features, rank, alpha, dropout_probability, bias, base_layer=original_layer)

    @property
    def original_layer(self) -> nn.Module:
        """The frozen layer."""
        layer: nn.Module = self.get_base_layer()
        return layer


class AdaLoRALayer(SVDLinear):  # type: ignore[misc]
    """An update in SVD form whose ranks can be taken: x (..., in) to alpha / (rank + 1e-5) P Lambda Q x (..., out).

    Ranks are taken by the manager's `update_and_allocate`; a layer by itself keeps its own.

    Args:
        input_dimension: Features of the input.
        output_dimension: Features of the output.
        rank: Singular triplets at the start.
        alpha: Scale of the update.
        dropout_probability: Dropout on the update's input while training.
        bias: Must be False: the SVD form has none.
        adaptive_rank: Whether ranks are taken at all.
        rank_allocation: "uniform", "importance" or "magnitude"; see `methods/adalora.py`.
        base_layer: What is updated; None gives the update alone.

    Raises:
        ConfigError: A value is out of its range.
        MethodError: `bias` is True.
        UnknownNameError: `rank_allocation` is none of these.
    """

    def __init__(
        self,
        input_dimension: int,
        output_dimension: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.1,
        bias: bool = False,
        adaptive_rank: bool = True,
        rank_allocation: str = "uniform",
        *,
        base_layer: nn.Module | None = None,
    ) -> None:
        _check(rank, alpha, dropout_probability, input_dimension, output_dimension)
        if bias:
            raise MethodError(
                "AdaLoRA has no bias of its own: its update is P Lambda Q x; use bias=False, or LoRA"
            )
        if rank_allocation not in ALLOCATIONS:
            raise UnknownNameError("rank allocation", rank_allocation, ALLOCATIONS)
        config = peft.AdaLoraConfig(
            init_r=rank,
            target_r=rank,
            total_step=1 << 30,
            lora_alpha=alpha,
            lora_dropout=dropout_probability,
            fan_in_fan_out=isinstance(base_layer, Conv1D),
        )
        base = base_layer or _Nothing(input_dimension, output_dimension)
        super().__init__(base, ADAPTER, config=config, r=rank, lora_alpha=alpha)
        self.adaptive_rank, self.rank_allocation = adaptive_rank, rank_allocation
        _settle(self, base)

    def get_effective_rank(self) -> int:
        """The rank of the update as it stands.

        Returns:
            How many of its singular values are not zero: none before the first step, all of them then, fewer where the
            allocator has taken some.
        """
        return int((self.lora_E[ADAPTER] != 0).sum())

    def orthogonality(self) -> torch.Tensor:
        """||P'P - I|| + ||QQ' - I|| in the Frobenius norm, halved: 0 where both are orthogonal.

        Returns:
            A number with a gradient.
        """
        p, q = self.lora_B[ADAPTER], self.lora_A[ADAPTER]
        unit = torch.eye(q.shape[0], dtype=q.dtype, device=q.device)
        both: torch.Tensor = torch.linalg.norm(p.T @ p - unit) + torch.linalg.norm(q @ q.T - unit)
        return both / 2


class _ReadByAttention:
    """For the `out_proj` of nn.MultiheadAttention, which is read and never called: what is read has the update in it."""

    @property
    def weight(self: Any) -> torch.Tensor:
        """W0 with the update, (out, in)."""
        weight: torch.Tensor = self.get_base_layer().weight
        if self.disable_adapters or self.merged:
            return weight
        update: torch.Tensor = self.get_delta_weight(ADAPTER)
        return weight + update.to(weight.dtype)

    @property
    def bias(self: Any) -> torch.Tensor | None:
        """The base's bias with the update's own, (out,)."""
        bias: torch.Tensor | None = self.get_base_layer().bias
        if self.disable_adapters or self.merged or not getattr(self, "lora_bias", {}).get(ADAPTER):
            return bias
        own: torch.Tensor = self.lora_B[ADAPTER].bias * self.scaling[ADAPTER]
        return own if bias is None else bias + own.to(bias.dtype)


class AttentionLoRA(_ReadByAttention, LoRALinear):
    """LoRA on the `out_proj` of nn.MultiheadAttention; arguments as of `LoRALinear`, dropout has no place."""


class AttentionAdaLoRA(_ReadByAttention, AdaLoRALayer):
    """AdaLoRA on the `out_proj` of nn.MultiheadAttention; arguments as of `AdaLoRALayer`, dropout has no place."""


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """How many features a linear layer takes and gives.

    Args:
        layer: Any module.

    Returns:
        Features in and out.

    Raises:
        MethodError: It is no `nn.Linear` or Conv1D, or its weight is quantised.
    """
    if not isinstance(layer, nn.Linear | Conv1D):
        raise MethodError(
            f"LoRA and AdaLoRA adapt nn.Linear and transformers' Conv1D, not {type(layer).__name__}"
        )
    weight: torch.Tensor = layer.weight
    if not weight.is_floating_point():
        raise MethodError(
            f"the weight of {type(layer).__name__} is quantised ({weight.dtype}); use peft itself for it"
        )
    return (
        (weight.shape[0], weight.shape[1])
        if isinstance(layer, Conv1D)
        else (layer.in_features, layer.out_features)
    )


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What one of the layers of this module trains.

    Args:
        layer: A `LoRALayer` or `AdaLoRALayer`.

    Returns:
        Name in the layer, without peft's name of the adapter, to parameter.
    """
    found = {}
    for part in _OWN:
        for name, parameter in getattr(layer, part, nn.Module()).named_parameters():
            rest = name.removeprefix(ADAPTER).lstrip(".")  # AdaLoRA's are bare tensors, LoRA's are layers
            found[f"{part}.{rest}" if rest else part] = parameter
    return found


def _settle(layer: Any, base: nn.Module) -> None:
    """Freeze the base, and let the adapter train in float32 at least, in the base's mode."""
    base.requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if ".ranknum." in f".{name}":  # a divisor; peft lets it train where it moves it
            parameter.requires_grad_(False)
        if not name.startswith("base_layer.") and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    layer.train(base.training)


def _check(rank: int, alpha: float, dropout: float, *dimensions: int) -> None:
    """Refuse values out of their range."""
    for name, value in (
        ("rank", rank),
        *zip(("input_dimension", "output_dimension"), dimensions, strict=True),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number from 1, not {value!r}")
    if not alpha > 0:
        raise ConfigError(f"alpha must be above 0, not {alpha!r}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout_probability must be in [0, 1), not {dropout!r}")
