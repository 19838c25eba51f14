"""Whether a base has the places that an adapter's tensors stand on, asked before anything is attached."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from peftlab.errors import CheckpointError
from peftlab.importing.foreign import PREFIX, Foreign

_SHOWN = 3
_INNER = 3
"""Names from a missing module on: its own, the tensor's kind, and `weight`."""


def check_places(foreign: Foreign, tensors: Mapping[str, torch.Tensor], model: nn.Module, base: str) -> None:
    """Refuse an adapter with tensors on modules that a base does not have.

    Args:
        foreign: The adapter, for the message.
        tensors: Its tensors by peft's names in files, as they were translated.
        model: The base.
        base: The base's name, for the message.

    Raises:
        CheckpointError: Some have no place; says which, what is there instead, and whose adapter it is.
    """
    missing = {}
    for name in tensors:
        place = _missing_place(name.removeprefix(PREFIX), model) if name.startswith(PREFIX) else None
        if place is not None:
            missing[name.removeprefix(PREFIX)] = place
    if missing:
        tensor, (parent, child) = next(iter(missing.items()))
        raise CheckpointError(
            f"{foreign.path} does not fit the base {name_base(base, model)}: {len(missing)} of its {len(tensors)} tensors"
            f" have no place there, such as '{tensor}': {_what_is_there(model, parent, child)}; {_own_base(foreign)}"
        )


def check_ranks(foreign: Foreign, pattern: Iterable[str], model: nn.Module, base: str) -> None:
    """Refuse AdaLoRA's ranks of modules that a base does not have.

    Args:
        foreign: The adapter, for the message.
        pattern: Names of the pattern.
        model: The base.
        base: The base's name, for the message.

    Raises:
        CheckpointError: Some have no place.
    """
    own = {name for name, _ in model.named_modules()}
    named = list(pattern)
    missing = [name for name in named if name.removeprefix(PREFIX).partition(".lora_E")[0] not in own]
    if missing:
        raise CheckpointError(
            f"{foreign.path} does not fit the base {name_base(base, model)}: its rank_pattern speaks of '{missing[0]}'"
            f" ({len(missing)} of {len(named)} are like it), and the base has no such module; {_own_base(foreign)}"
        )


def _own_base(foreign: Foreign) -> str:
    """What to do, with the base that the file names."""
    named = f"; the file names '{foreign.base}'" if foreign.base else ""
    return f"import it onto the base that it was trained on{named}"


def name_base(base: str, model: nn.Module) -> str:
    """A base in words.

    Args:
        base: Its name as given; "" where it has none.
        model: The model.

    Returns:
        E.g. "'org/model' (LlamaForCausalLM)".
    """
    return f"'{base}' ({type(model).__name__})" if base else f"({type(model).__name__})"


def nearest(name: str, known: Sequence[str]) -> str:
    """Some of the names that there are, those most like a name first.

    Args:
        name: What was looked for.
        known: What there is.

    Returns:
        A few of them, with commas between.
    """
    close = difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.3)
    return ", ".join(close or list(known)[:_SHOWN]) or "none"


def _missing_place(name: str, model: nn.Module) -> tuple[str, str] | None:
    """The deepest module on a tensor's path and the child that it lacks; None where the path leads to a module.

    What comes after an adapted module is the adapter's own (`lora_A.weight`), and so is what stands on a whole attention.
    """
    parts = name.replace(".base_layer.", ".").split(".")
    module, depth = model, 0
    while depth < len(parts) and parts[depth] in module._modules:
        module, depth = getattr(module, parts[depth]), depth + 1
    rest = parts[depth:]
    if not rest or not module._modules:
        return None
    if rest[0].isdecimal() or len(rest) >= _INNER:
        return ".".join(parts[:depth]), rest[0]
    return None


def _what_is_there(model: nn.Module, parent: str, child: str) -> str:
    """What a module has instead of a child that it lacks."""
    children = list(model.get_submodule(parent)._modules)
    where = f"'{parent}'" if parent else "the model"
    if child.isdecimal() and children == [str(i) for i in range(len(children))]:
        return f"{where} has {len(children)} parts, 0 to {len(children) - 1}, and no '{child}'"
    return f"{where} has no '{child}', it has {', '.join(children[:8])}"
