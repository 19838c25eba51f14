"""What peft does not do on LoRA, or would do otherwise than asked: refused before anything is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from peftlab.attaching.lora_start import Start
from peftlab.errors import MethodError
from peftlab.family import Selection

if TYPE_CHECKING:
    from peftlab.methods.lora import Settings


def check_start(model: nn.Module, selection: Selection, start: Start, ranks: Mapping[str, int]) -> None:
    """Refuse a start that peft could not compute here, or would compute wrongly.

    Args:
        model: The base.
        selection: What gets an adapter.
        start: How A and B start.
        ranks: Path to rank.

    Raises:
        MethodError: It cannot start so.
    """
    if start.name == "corda" and importlib.util.find_spec("attr") is None:
        raise MethodError(
            "init corda: peft 0.21's CorDA needs a package it does not install: pip install attrs"
        )
    if start.name not in ("default", "gaussian") and selection.experts:
        raise MethodError(
            f"init {start.name}: peft starts experts held as 3-D parameters ({selection.experts[0].path}) as default or"
            " gaussian only; choose one of these, or targets without them"
        )
    for site in selection.adapted:
        rank, smallest = ranks[site.path], min(site.in_features, site.out_features)
        most = {"lora_ga": smallest // 2, "eva": site.in_features}.get(start.name, smallest)
        if (start.rewrites or start.name == "eva") and rank > most:
            raise MethodError(
                f"init {start.name}: rank {rank} is above {most}, the most that {site.path} ({site.in_features} to"
                f" {site.out_features} features) has singular vectors for; lower rank or set rank_pattern"
            )
        if start.name == "olora" and type(model.get_submodule(site.path)).__name__ == "Conv1D":
            raise MethodError(
                f"init olora: peft 0.21 takes {site.path}, a Conv1D, for a Linear, and A and B get each other's shape;"
                " choose pissa"
            )


def check_beside_others(scope: str, settings: Settings, start: Start) -> None:
    """Refuse what an adapter beside those of other towers cannot have for itself.

    Raises:
        MethodError: It is asked for.
    """
    for name, asked in (
        (f"init={start.name}", start.rewrites or start.from_data),
        (f"bias={settings.bias}", settings.bias != "none"),
        (f"optimizer={settings.optimizer}", settings.optimizer != "adamw"),
        ("modules_to_save", bool(settings.modules_to_save)),
    ):
        if asked:
            raise MethodError(
                f"{name} on {scope}: an adapter beside those of other towers has the base's own weights and the optimizer in"
                " common with them; leave it out, or train one tower alone"
            )


def check_experts(selection: Selection, settings: Settings) -> None:
    """Refuse what peft does not do on experts held as 3-D parameters.

    Raises:
        MethodError: It is asked for.
    """
    if not selection.experts:
        return
    where = selection.experts[0].path
    for name, asked in (
        ("use_dora=true", settings.use_dora),
        ("optimizer=lora_fa", settings.optimizer == "lora_fa"),
    ):
        if asked:
            raise MethodError(
                f"{name}: peft does not do it on experts held as 3-D parameters ({where}); choose targets without them, such"
                " as attention, or leave it out"
            )


def check_pattern_of_experts(selection: Selection, patterns: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a pattern that speaks of experts held as 3-D parameters: peft gives these one rank and one alpha.

    Args:
        selection: What gets an adapter.
        patterns: Setting to the values by path.

    Raises:
        MethodError: One does.
    """
    for name, pattern in patterns.items():
        for site in selection.experts:
            if site.path in pattern:
                raise MethodError(
                    f"{name}: peft gives experts held as 3-D parameters ({site.path}) one rank and one alpha; name what else"
                    " it shall reach, such as attention, or leave it out"
                )
