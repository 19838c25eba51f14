"""Who still holds a model that should have died: variables, attributes, closures, by name.

The garbage collector knows which object refers to which; from what lives on, they are followed back through containers and
modules to something that has a name. The variables of running functions are read from the stack.
"""

from __future__ import annotations

import gc
import inspect
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_MOST_NAMES = 8
_MOST_STEPS = 16
_FOLLOWED = (
    dict,
    list,
    tuple,
    set,
    frozenset,
    deque,
    types.CellType,
    types.MethodType,
    nn.Module,
    torch.Tensor,
)
"""What holds something on behalf of someone else."""
_OWN = (__name__, "peftlab.model_cache")

NOT_OF_PYTHON = "something outside Python, such as a graph that autograd keeps"
"""The holder where no Python object is one."""


def name_holders(model: Any, storages: Sequence[weakref.ref[torch.UntypedStorage]]) -> tuple[str, ...]:
    """What keeps a model, or tensors that share its weights, alive.

    Args:
        model: The model; None where it has died.
        storages: Weak references to the storages of its weights.

    Returns:
        The holders in words, at most eight.
    """
    level: list[Any] = [model]
    if model is None:
        pointers = {storage.data_ptr() for reference in storages if (storage := reference()) is not None}
        level = list(_tensors_at(pointers))
    names: dict[str, None] = {}
    seen = {id(held) for held in level}
    for _ in range(_MOST_STEPS):
        names |= dict.fromkeys(_running_variables({id(held) for held in level}))
        level, found = _one_step_back(level, seen)
        names |= dict.fromkeys(found)
        if not level or len(names) >= _MOST_NAMES:
            break
    return tuple(names)[:_MOST_NAMES] or (NOT_OF_PYTHON,)


def _tensors_at(pointers: set[int]) -> Iterator[torch.Tensor]:
    """Tensors known to Python whose storage begins at one of some addresses."""
    for found in gc.get_objects():
        # type, not isinstance: to ask a lazy module for its class would load it
        if type(found) not in (torch.Tensor, nn.Parameter) or found.layout is not torch.strided:
            continue
        if found.untyped_storage().data_ptr() in pointers:
            yield found


def _one_step_back(level: list[Any], seen: set[int]) -> tuple[list[Any], list[str]]:
    """What refers to some objects: what is to be followed further, and the names of the rest."""
    running = {id(frame) for frame in _stack(own=True)}
    further: list[Any] = []
    names: list[str] = []
    for referrer in gc.get_referrers(*level):
        if referrer is level or referrer is further or id(referrer) in seen or id(referrer) in running:
            continue
        seen.add(id(referrer))
        module = _module_of(referrer)
        if module is not None:
            names += [f"variable '{key}' of module {module}" for key in _keys(referrer, seen)]
        elif isinstance(referrer, _FOLLOWED):
            further.append(referrer)
        else:
            names += _describe(referrer, seen)
    return further, names


def _describe(holder: Any, seen: set[int]) -> Iterable[str]:
    """An object that holds one of those that were seen, in words."""
    if isinstance(holder, types.FrameType):
        held = [name for name, value in _locals(holder) if id(value) in seen]
        return [f"variable '{name}' of {_place(holder)}, kept by a traceback or a generator" for name in held]
    if isinstance(holder, types.FunctionType):
        return [f"function {holder.__module__}.{holder.__qualname__}"]
    kind = f"{type(holder).__module__}.{type(holder).__qualname__}"
    attributes = getattr(holder, "__dict__", None)
    keys = list(_keys(attributes, seen)) if isinstance(attributes, Mapping) else []
    return [f"attribute '{key}' of a {kind}" for key in keys] or [f"a {kind}"]


def _running_variables(held: set[int]) -> Iterator[str]:
    """The variables of running functions that are one of some objects."""
    for frame in _stack():
        if frame.f_locals is frame.f_globals:
            continue  # a module's variables are found as such
        yield from (
            f"variable '{name}' of {_place(frame)}" for name, value in _locals(frame) if id(value) in held
        )


def _stack(*, own: bool = False) -> Iterator[types.FrameType]:
    """The frames that are running; those of this file and of the cache only where asked for."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if own or frame.f_globals.get("__name__") not in _OWN:
            yield frame
        frame = frame.f_back


def _locals(frame: types.FrameType) -> list[tuple[str, Any]]:
    """The variables of a frame; Python before 3.13 keeps the copy that it makes of them, and with it the model."""
    copied = frame.f_locals
    pairs = list(copied.items())
    if type(copied) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        copied.clear()
    return pairs


def _place(frame: types.FrameType) -> str:
    """Function, file and line of a frame."""
    code = frame.f_code
    return f"{code.co_qualname} ({code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"


def _module_of(candidate: Any) -> str | None:
    """The module whose variables a dict is, None for any other object."""
    if type(candidate) is not dict:
        return None
    name = candidate.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    return name if module is not None and vars(module) is candidate else None


def _keys(mapping: Mapping[Any, Any], seen: set[int]) -> list[Any]:
    """The keys under which a mapping holds objects that were seen."""
    return [key for key, value in list(mapping.items()) if id(value) in seen]
