"""What has been attached, for a person: adapter by adapter, what it trains counted by kind, and ranks that are too high."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftlab.attaching.attachment import PeftAttachment
from peftlab.attaching.combining import HybridAttachment
from peftlab.attaching.towers import TowersAttachment
from peftlab.config import AdapterSettings
from peftlab.method import Attachment

_A, _B = ".lora_A.", ".lora_B."
_WHOLE = ".modules_to_save."


def describe_adapters(attached: Attachment, adapters: Sequence[AdapterSettings]) -> list[dict[str, Any]]:
    """Every adapter of a run, with what it trains.

    Args:
        attached: What was attached.
        adapters: What was asked for, in the same order.

    Returns:
        For each: scope, method, peft's type (None where it is not of peft), tensors, parameters, and parameters by kind: of
        the method, or `lora` and `new_layer` of a hybrid, and `whole`, of heads and embeddings trained whole. JSON-ready.
    """
    parts = list(attached.parts.values()) if isinstance(attached, TowersAttachment) else [attached]
    return [_describe(part, adapter) for part, adapter in zip(parts, adapters, strict=True)]


def _describe(part: Attachment, adapter: AdapterSettings) -> dict[str, Any]:
    """One adapter."""
    parameters = part.parameters()
    kind = str(part.config.peft_type.value).lower() if isinstance(part, PeftAttachment) else None
    return {
        "scope": adapter.scope,
        "method": adapter.method,
        "peft_type": kind,
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters.values()),
        "kinds": _kinds(part, adapter.method),
    }


def _kinds(part: Attachment, method: str) -> dict[str, int]:
    """Parameters by kind, without kinds of which there are none."""
    if isinstance(part, HybridAttachment):
        found = dict(part.counts)
    else:
        found = {method: 0, "whole": 0}
        for name, parameter in part.parameters().items():
            found["whole" if _WHOLE in name else method] += parameter.numel()
    return {kind: number for kind, number in found.items() if number}


def note_ranks(attached: Attachment) -> list[str]:
    """Say where a rank is above what an update of that layer can have: min(in, out).

    Args:
        attached: What was attached.

    Returns:
        One sentence, or none.
    """
    above = list(_too_high(attached))
    if not above:
        return []
    path, rank, (smallest, largest) = max(above, key=lambda found: found[1] / found[2][0])
    return [
        f"rank {rank} is above {smallest}, the most that an update of {path} ({smallest} and {largest} features) can have;"
        f" so are the ranks of {len(above)} layers in all: rank {smallest} there says as much with fewer parameters"
    ]


def _too_high(attached: Attachment) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """The layers with a rank above their narrower side: path, rank, and both widths."""
    parameters: dict[str, nn.Parameter] = attached.parameters()
    experts = [site.path for site in attached.selection.experts]
    for name, a in parameters.items():
        b = parameters.get(name.replace(_A, _B))
        if _A not in name or b is None or a.dim() != 2 or any(f".{path}." in name for path in experts):
            continue
        widths = sorted((a.shape[1], b.shape[0]))
        if a.shape[0] > widths[0]:
            path = name.partition(_A)[0].removeprefix("base_model.model.")
            yield path, a.shape[0], (widths[0], widths[1])
