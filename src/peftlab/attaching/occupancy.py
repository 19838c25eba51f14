"""One attachment on a base at a time: a second one would stand on the first, and neither could be taken off rightly."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from peftlab.errors import MethodError

_OWNERS: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()
"""Base to the attachment that is on it; an attachment that nobody holds any more holds no base."""


def check_free(model: nn.Module, *, beneath: Any = None) -> None:
    """Refuse a base that has adapters.

    Args:
        model: The base.
        beneath: An attachment that may be on it: the new one stands on that.

    Raises:
        MethodError: It has an attachment that is neither removed nor merged, or layers of peft.
    """
    owner = _OWNERS.get(model, lambda: None)()
    if owner is not None and owner is not beneath and not owner.ended:
        raise MethodError(
            f"this {type(model).__name__} has an adapter already ({type(owner).__name__}); take it off first with its"
            " remove() or merge(), or train both at once: method 'hybrid', or adapters with scopes"
        )
    wrapped = next((path for path, module in model.named_modules() if _is_of_peft(module)), None)
    if wrapped is not None and beneath is None:
        raise MethodError(
            f"this {type(model).__name__} has layers of peft already ({wrapped}); take them off first (unload() or"
            " merge_and_unload() of peft's model)"
        )


def _is_of_peft(module: nn.Module) -> bool:
    """Whether a module is one of peft's layers or copies."""
    return bool(getattr(module, "adapter_layer_names", ()))


def occupy(model: nn.Module, attachment: Any) -> None:
    """Note that an attachment is on a base.

    Args:
        model: The base.
        attachment: Has `ended`: "" while it is on the base.
    """
    _OWNERS[model] = ref(attachment)
