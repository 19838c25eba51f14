"""The optimizers that peft offers for LoRA: LoRA+ by its maker, LoRA-FA by its class.

LoRA+: B learns `ratio` times as fast as A. LoRA-FA: A is frozen, B follows g_B (A A')^-1 / s^2, s the layer's scale.

Source: Hayou et al. 2024, arXiv 2402.12354, and Zhang et al. 2023, arXiv 2308.03303; peft `optimizers/`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from torch.optim import Optimizer

_PARALLEL = ("params", "names", "scaling_factors")
"""What a group of LoRA-FA holds for each of its tensors."""


def make_lora_plus(
    model: Any, kind: type[Optimizer], options: Mapping[str, Any], *, ratio: float, weight_decay: float
) -> Optimizer:
    """LoRA+ over everything that requires a gradient.

    B, and whatever has one axis (biases, DoRA's magnitude), learns `ratio` times as fast as the rest, as in peft.

    Args:
        model: The peft model.
        kind: The optimizer's class.
        options: Its settings, "lr" among them.
        ratio: B's learning rate over A's.
        weight_decay: Weight decay of all but biases and the gains of norms.

    Returns:
        The optimizer.
    """
    made: Optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay, **options
    )
    made.param_groups[:] = [group for group in made.param_groups if group["params"]]
    return made


def make_lora_fa(
    model: nn.Module, scales: Mapping[str, float], options: Mapping[str, Any], *, weight_decay: float
) -> Optimizer:
    """LoRA-FA over the pairs of A and B, and AdamW over what else requires a gradient.

    Args:
        model: The peft model; A requires no gradient.
        scales: Name of each A and B to the scale of its layer.
        options: AdamW's settings; the learning rate and the betas are taken, epsilon is peft's 1e-6.
        weight_decay: Weight decay of all but biases and the gains of norms.

    Returns:
        The optimizer.
    """
    norms = {id(p) for m in model.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    decaying: list[tuple[str, nn.Parameter]] = []
    free: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if name in scales or parameter.requires_grad:
            (free if name.endswith("bias") or id(parameter) in norms else decaying).append((name, parameter))
    groups = [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "scaling_factors": [scales.get(name) for name, _ in members],
            "weight_decay": decay,
        }
        for members, decay in ((decaying, weight_decay), (free, 0.0))
        if members
    ]
    return ResumableLoraFA(groups, lr=options["lr"], betas=options.get("betas", (0.9, 0.999)))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class's name: every architecture has its own."""
    return type(module).__name__.lower().endswith("norm")


class ResumableLoraFA(LoraFAOptimizer):  # type: ignore[misc]
    """peft's LoRA-FA that skips what has no gradient, and whose state belongs to tensors, as in every torch optimizer.

    peft's keys its state by name and reads every B's gradient: phases could not rest a pair, and nothing could be resumed.
    """

    state: Any

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over what has a gradient; the state of a pair is B's.

        Args:
            closure: Reevaluates the model and returns the loss; or None.

        Returns:
            The closure's loss, or None.
        """
        whole = [[group[key] for key in _PARALLEL] for group in self.param_groups]
        owners: dict[str, nn.Parameter] = {}
        for members in whole:
            for parameter, name, scale in zip(*members, strict=True):
                owners[_key(name, scale)] = parameter  # of a pair the last one, B
        names = {id(parameter): key for key, parameter in owners.items()}
        self.state = defaultdict(
            dict, {names[id(parameter)]: state for parameter, state in self.state.items()}
        )
        for group, members in zip(self.param_groups, whole, strict=True):
            moving = [m for m in zip(*members, strict=True) if owners[_key(m[1], m[2])].grad is not None]
            group |= {key: [member[i] for member in moving] for i, key in enumerate(_PARALLEL)}
        try:
            return super().step(closure)
        finally:
            for group, members in zip(self.param_groups, whole, strict=True):
                group |= dict(zip(_PARALLEL, members, strict=True))
            self.state = defaultdict(dict, {owners[key]: state for key, state in self.state.items()})


def _key(name: str, scale: float | None) -> str:
    """Under which name peft keeps the state of a tensor: a pair of A and B has one."""
    return name if scale is None else name[: name.find("lora")] + "lora"
