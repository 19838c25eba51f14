"""The table: every method on every model, and every promise of a method, one after the other.

`peftlab list methods --prove` runs this. A cell is one method with its default settings on one architecture and one kind of
task: attached to a tiny model, trained until law 1 is shown, switched off, saved and put back, removed. Each property is
tried on models of its own. What cannot be is refused by the method itself, and the cell says why; anything else that goes
wrong is a failure and says what.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

import torch
from torch import nn

from peftlab.capabilities import trials
from peftlab.capabilities.bases import BASES, Base, answers, attach
from peftlab.capabilities.trials import NotApplicable, train
from peftlab.catalog import METHODS
from peftlab.errors import MethodError, ModelError, PeftlabError, ScheduleError, TargetError
from peftlab.proof import fingerprint

WORKS, REFUSED, FAILED, NOT_APPLICABLE = "works", "refused", "fails", "n/a"

PROPERTIES: dict[str, Callable[[str, Base], None]] = {
    "count": trials.try_count,
    "accumulation": trials.try_accumulation,
    "padding": trials.try_padding,
    "bf16": trials.try_bfloat16,
    "checkpointing": trials.try_checkpointing,
    "generation": trials.try_generation,
    "resume": trials.try_resume,
    "phases": trials.try_phases,
    "merge": trials.try_merge,
}
"""Each promise and how it is tried."""


@dataclass(frozen=True, slots=True)
class Capability:
    """How one method does on one model.

    Attributes:
        method: Its name.
        model_type: transformers' model type.
        head: The kind of task.
        verdict: "works", "refused" or "fails".
        reason: Why not; "" where it works.
        tensors: Tensors it trains.
        parameters: Parameters it trains.
        base_parameters: Parameters of the base.
        identity: Whether a fresh adapter leaves the model's answers as they are (to 1e-5).
        properties: Each property to "works", or to "refused: ...", "n/a: ..." or "fails: ..." with the reason.
    """

    method: str
    model_type: str
    head: str
    verdict: str
    reason: str = ""
    tensors: int = 0
    parameters: int = 0
    base_parameters: int = 0
    identity: bool = False
    properties: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def prove_methods(tell: Callable[[Capability], object] | None = None) -> dict[str, Any]:
    """Try every method on every model, and every property of those that work.

    Args:
        tell: Is given each result as it comes.

    Returns:
        Plain values: versions, and a row for each cell under "cells".
    """
    cells = []
    for capability in _cells():
        cells.append(capability.to_json())
        if tell is not None:
            tell(capability)
    versions = {name: metadata.version(name) for name in ("peft", "transformers", "torch")}
    return {"versions": versions, "cells": cells}


def _cells() -> Iterator[Capability]:
    """Every cell of the table, one after the other."""
    for base in BASES:
        for method in METHODS.names():
            cell = try_method(method, base)
            if cell.verdict == WORKS:
                found = {name: try_property(method, base, name) for name in PROPERTIES}
                cell = replace(cell, properties=found)
            yield cell


def try_method(method: str, base: Base) -> Capability:
    """Try one method on one architecture, without the properties.

    Args:
        method: A leaf of `methods/`.
        base: The architecture.

    Returns:
        The cell.
    """
    found: list[Capability] = []
    verdict, reason = _verdict(lambda: found.append(_try(method, base)))
    if found:
        return found[0]
    model = base.build()
    size = sum(p.numel() for p in model.parameters())
    return Capability(method, base.model_type, base.head, verdict, reason, base_parameters=size)


def try_property(method: str, base: Base, name: str) -> str:
    """Try one property of a method on one architecture.

    Args:
        method: A leaf of `methods/`.
        base: The architecture.
        name: A key of `PROPERTIES`.

    Returns:
        "works", or the verdict with the reason behind a colon.
    """
    verdict, reason = _verdict(lambda: PROPERTIES[name](method, base))
    return f"{verdict}: {reason}" if reason else verdict


def _verdict(trial: Callable[[], object]) -> tuple[str, str]:
    """What comes of a trial: the verdict, and why where it does not work."""
    try:
        with _quiet():
            trial()
    except NotApplicable as error:
        return NOT_APPLICABLE, str(error)
    except (MethodError, TargetError, ScheduleError, ModelError) as error:
        return REFUSED, str(error)
    except Exception as error:  # noqa: BLE001 - model code can fail in any way; the table says how
        name = "" if isinstance(error, PeftlabError | AssertionError) else f"{type(error).__name__}: "
        return FAILED, f"{name}{error}".splitlines()[0][:200]
    return WORKS, ""


@contextmanager
def _quiet() -> Iterator[None]:
    """One thread, a random stream of its own, and no remarks of peft's and transformers'."""
    from transformers.utils import logging

    threads, level = torch.get_num_threads(), logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    torch.set_num_threads(1)  # everything is tiny: more threads only wait for each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _try(method: str, base: Base) -> Capability:
    """Attach, train, switch off, put back, remove; the cell with what is found."""
    model: nn.Module = base.build()
    size = sum(p.numel() for p in model.parameters())
    batch = base.batch(model)
    marks = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    bare = answers(model, batch)
    attached = attach(method, base, model)
    identity = bool((answers(attached.model, batch) - bare).abs().max() <= 1e-5)
    parameters = attached.parameters()
    train(attached, batch, base.head)
    trained = answers(attached.model, batch)
    with attached.disabled():
        if not torch.equal(answers(attached.model, batch), bare):
            raise AssertionError("switched off, the model does not answer as the base does")
    kept = attached.tensors()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    attached.load(kept)
    if not torch.equal(answers(attached.model, batch), trained):
        raise AssertionError("put back, the adapter does not answer as before")
    after = {name: fingerprint(tensor) for name, tensor in attached.remove().state_dict().items()}
    if after != marks:
        raise AssertionError("removed, the adapter leaves another base behind")
    count = sum(p.numel() for p in parameters.values())
    return Capability(method, base.model_type, base.head, WORKS, "", len(parameters), count, size, identity)
