"""The ways in which a sequence of tasks is learned: what each task has of its own, and what it shares with those before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peftlab.catalog import METHODS
from peftlab.errors import ConfigError

Plan = Literal["isolated", "sequential", "replay", "joint", "full", "shared_layer"]
PLANS: dict[Plan, str] = {
    "isolated": "every task has an adapter of its own",
    "sequential": "one adapter learns the tasks one after another",
    "replay": "one adapter, with rows of earlier tasks among those of the new one",
    "joint": "one adapter learns all tasks at once, in as many steps as the others take together",
    "full": "the base itself learns the tasks one after another",
    "shared_layer": "every task has a LoRA of its own, and one new layer goes on learning for all",
}
"""Plan to what it means."""
_PLAIN_STARTS = ("default", "gaussian", "orthogonal")
LAYERED = "hybrid"
"""The method whose new layer can be shared while LoRA is a task's own."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way in which the sequence is learned.

    Attributes:
        name: What it is called, e.g. "lora isolated".
        plan: What is shared.
        method: The method that is attached.
        settings: Its settings.
        rate: Its learning rate as a multiple of LoRA's.
    """

    name: str
    plan: Plan
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0

    @property
    def isolated(self) -> bool:
        """Whether nothing that a task learned can change later."""
        return self.plan == "isolated"

    def shares(self, name: str, of_layer: frozenset[str]) -> bool:
        """Whether a tensor is one for all tasks.

        Args:
            name: The tensor's name, as of `Attachment.tensors`.
            of_layer: The names of the new layer's tensors.

        Returns:
            True where what one task does to it shows in all others.
        """
        if self.plan == "shared_layer":
            return name in of_layer
        return self.plan != "isolated"


def make_arms(methods: Sequence[str], plans: Sequence[Plan], settings: Mapping[str, Any]) -> list[Arm]:
    """The arms of some methods and plans.

    Args:
        methods: Methods that are attached.
        plans: What is shared; "full" is one arm, whatever the methods, and "shared_layer" is of hybrid alone.
        settings: Settings of methods, each taken by those that have it.

    Returns:
        The arms, method by method, full last.

    Raises:
        ConfigError: A plan has no method, or a setting no method that takes it.

    Example:
        >>> [arm.name for arm in make_arms(["lora"], ["isolated", "full"], {"rank": 4})]
        ['lora isolated', 'full sequential']
    """
    if "shared_layer" in plans and LAYERED not in methods:
        raise ConfigError(f"the plan shared_layer shares the new layer of hybrid: add {LAYERED} to methods")
    if settings.get("init", "default") not in _PLAIN_STARTS:
        raise ConfigError(
            f"init={settings['init']} starts from rows or from the base's weights, anew for every task: nothing could be"
            f" shared; take one of {', '.join(_PLAIN_STARTS)}"
        )
    arms, taken = [], set[str]()
    for method in methods:
        leaf = METHODS.load(method)
        own = {key: value for key, value in settings.items() if key in leaf.Settings.model_fields}
        taken |= own.keys()
        rate = float(getattr(leaf, "RATE_TO_LORA", 1.0))
        for plan in plans:
            if plan == "full" or (plan == "shared_layer" and method != LAYERED):
                continue
            arms.append(Arm(f"{method} {plan.replace('_', ' ')}", plan, method, own, rate))
    if idle := [key for key in settings if key not in taken]:
        raise ConfigError(f"{', '.join(idle)} has no effect on {', '.join(methods)}; leave it out")
    if "full" in plans:
        rate = float(METHODS.load("full").RATE_TO_LORA)
        arms.append(Arm("full sequential", "full", "full", {}, rate))
    return arms
