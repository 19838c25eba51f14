"""One attachment on a base at a time, put on wholly or not at all.

A second attachment would stand on the first, and neither could be taken off rightly. One that fails half-way leaves the base
as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from peftlab.errors import MethodError
from peftlab.insertion import MARK

_OWNERS: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()
"""Base to what is on it; what nobody holds any more holds no base."""


def check_free(model: nn.Module, *, beneath: Any = None) -> None:
    """Refuse a base that has adapters, whole or in a part.

    Args:
        model: The base.
        beneath: An attachment that may be on it: the new one stands on that.

    Raises:
        MethodError: It, a part of it, or what it is a part of has an attachment that is neither removed nor merged; it has
            layers of peft, or new blocks.
    """
    owner = _owner(model, beneath)
    if owner is not None:
        raise MethodError(
            f"this {type(model).__name__} has an adapter already ({type(owner).__name__}); take it off first with its"
            " remove() or merge(), or train both at once: method 'hybrid', or adapters with scopes"
        )
    if beneath is not None:
        return
    for path, module in model.named_modules():
        if getattr(module, "adapter_layer_names", ()):
            raise MethodError(
                f"this {type(model).__name__} has layers of peft already ({path}); take them off first (unload() or"
                " merge_and_unload() of peft's model)"
            )
        if MARK in vars(module):
            raise MethodError(
                f"this {type(model).__name__} has new blocks already ({path}), whose attachment is gone; load the base anew"
            )


def _owner(model: nn.Module, beneath: Any) -> Any:
    """What is on a base, on a part of it or on what it is a part of; None where it is free."""
    parts = set(model.modules())
    for base, reference in list(_OWNERS.items()):
        owner = reference()
        if owner is None or owner is beneath or owner.ended:
            continue
        if base in parts or any(module is model for module in base.modules()):
            return owner
    return None


def occupy(model: nn.Module, owner: Any) -> None:
    """Note that something is on a base.

    Args:
        model: The base.
        owner: Has `ended`: "" while it is on the base.
    """
    _OWNERS[model] = ref(owner)


class AllOrNothing(type):
    """The class of attachments: making one changes its base wholly or not at all; new modules have the base's mode."""

    def __call__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Make an attachment.

        Args:
            model: The base.
            args: Further arguments of the attachment.
            kwargs: Further arguments of the attachment.

        Returns:
            The attachment.
        """
        put_back = snapshot(model)
        there, training, owner = set(model.modules()), model.training, _OWNERS.get(model)
        try:
            made = super().__call__(model, *args, **kwargs)
        except Exception:
            put_back()
            _OWNERS.pop(model, None)  # the failed one may live on in the traceback
            if owner is not None:
                _OWNERS[model] = owner
            raise
        for module in made.model.modules():
            if module not in there:
                module.training = training
        return made


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Note how a model is put together.

    Args:
        model: The model.

    Returns:
        A function that puts modules, attributes, hooks and `requires_grad` back as they are now; values of tensors are not
        touched.
    """
    kept = [
        (
            module,
            type(module),
            {k: (v, dict(v) if isinstance(v, dict) else None) for k, v in vars(module).items()},
        )
        for module in model.modules()
    ]
    required_grad = [(p, p.requires_grad) for p in model.parameters()]

    def put_back() -> None:
        for module, kind, attributes in kept:
            module.__class__ = kind
            for attribute in vars(module).keys() - attributes.keys():
                del vars(module)[attribute]
            for attribute, (value, content) in attributes.items():
                if content is not None:  # in place: handles of hooks know their dict
                    value.clear()
                    value.update(content)
                vars(module)[attribute] = value
        for parameter, required in required_grad:
            parameter.requires_grad_(required)

    return put_back
