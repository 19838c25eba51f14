"""Which modules of a live base a foreign adapter stands on, and the shortest targets that mean exactly those."""

from __future__ import annotations

import re
from collections.abc import Iterable

import peft
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from peftlab.attaching.targeting import new_modules
from peftlab.errors import ConfigError, TargetError
from peftlab.family import FamilyMap, Selection
from peftlab.importing.fields import Fields
from peftlab.method import Head

_GROUPS = ("attention_qv", "attention", "mlp", "both")
_SHOWN = 5


def adapted_modules(fields: Fields, model: nn.Module) -> list[str]:
    """The modules that a config's target fields stand for, by peft's own rules.

    Args:
        fields: The config; its target fields are read.
        model: The base.

    Returns:
        Paths in the model's order.

    Raises:
        ConfigError: The fields cannot be read.
        TargetError: They stand for no module of this base.
    """
    values = {
        "target_modules": fields.take("target_modules", str, list),
        "exclude_modules": fields.take("exclude_modules", str, list),
        "layers_to_transform": fields.take("layers_to_transform", int, list),
        "layers_pattern": fields.take("layers_pattern", str, list) or None,
        "modules_to_save": fields.take("modules_to_save", list),
    }
    try:
        config = peft.LoraConfig(**values, task_type=fields.values.get("task_type"))
        config = _maybe_include_all_linear_layers(config, model)
        found = [
            name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)
        ]
    except (ValueError, TypeError, re.error) as error:
        raise ConfigError(f"{fields.where}: its targets cannot be read: {error}") from error
    if not found:
        raise TargetError(
            f"{fields.where}: target_modules {values['target_modules']} match nothing in this {type(model).__name__}; the"
            " adapter belongs to another base"
        )
    return found


def name_targets(paths: Iterable[str], family: FamilyMap, *, experts: bool = False) -> str | tuple[str, ...]:
    """The shortest targets that stand for exactly some modules.

    Args:
        paths: Their paths.
        family: The map of the base.
        experts: Whether the experts held as 3-D parameters are adapted too.

    Returns:
        A target group, or names, or paths.

    Raises:
        TargetError: A module is none that a method here adapts.
    """
    wanted = set(paths)
    linear = {site.path for site in family.sites if site.linear}
    others = sorted(wanted - linear)
    if others:
        raise TargetError(
            "the adapter stands on modules that are no linear layers, which no method here adapts:"
            f" {', '.join(others[:_SHOWN])}"
        )
    for group in _GROUPS:
        found = _select(family, group)
        if {site.path for site in found.adapted} == wanted and bool(found.experts) == experts:
            return group
    if experts:
        raise TargetError("the adapter stands on experts and on some of the layers beside them only")
    short = tuple(sorted({path.rpartition(".")[2] for path in wanted}))
    if {site.path for site in family.select(short).adapted} == wanted:
        return short
    return tuple(sorted(wanted))


def _select(family: FamilyMap, group: str) -> Selection:
    """What a target group stands for; nothing where it cannot be chosen in this model."""
    try:
        return family.select(group, experts=True)
    except TargetError:
        return Selection(())


def modules_beside(names: Iterable[str] | None, model: nn.Module, head: Head) -> tuple[str, ...]:
    """The modules that a config trains whole beside the adapter, without the new head that every method trains.

    Args:
        names: The config's `modules_to_save`.
        model: The base.
        head: What it ends in.

    Returns:
        Paths in the model's order.
    """
    endings = tuple(str(name) for name in names or ())
    heads = new_modules(model, head)
    return tuple(
        path
        for path, _ in model.named_modules()
        if endings and path.endswith(endings) and path.partition(".")[0] not in heads
    )
