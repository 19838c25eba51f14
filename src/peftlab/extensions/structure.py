"""One base for any number of models: modules of their own on the very same weights.

peft and new blocks change the module that they are put into. Each model is therefore a copy of the base's modules whose
parameters share the base's storage; only what can be told apart without memory is its own: which tensors require a gradient,
the config, and the buffers, which a forward pass may write.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import nn

from peftlab.errors import MethodError
from peftlab.inspection.model_fingerprint import hash_tensor


def copy_structure(model: nn.Module, *, own: bool = False) -> Any:
    """A copy of a model's modules on the model's own weights.

    Args:
        model: The base; it is not changed, whatever is done to the copy but writing into its weights.
        own: Whether the copy has weights of its own, to train them.

    Returns:
        The copy, its own `requires_grad` flags all as the base's; ties between tensors are kept.

    Raises:
        MethodError: The model carries adapters, its `forward` was exchanged, or weights of its own would be quantised ones.
    """
    _refuse(model)
    memo: dict[int, Any] = {id(p): _parameter(name, p, own=own) for name, p in model.named_parameters()}
    for module in model.modules():  # a tensor on a graph cannot be copied
        left = [v for v in vars(module).values() if isinstance(v, torch.Tensor) and not v.is_leaf]
        memo |= {id(tensor): tensor.detach().clone() for tensor in left}
    return copy.deepcopy(model, memo)


def _parameter(name: str, parameter: nn.Parameter, *, own: bool) -> nn.Parameter:
    """The copy's parameter: the same storage, or the same values."""
    if own and not parameter.is_floating_point():
        raise MethodError(f"freeze_base=False: {name} is quantised and cannot be trained")
    if type(parameter) is not nn.Parameter:  # of a quantiser: its state is more than its storage
        if parameter.requires_grad or own:
            raise MethodError(
                f"{name} is a {type(parameter).__name__}: only plain parameters can be shared or copied"
            )
        return parameter
    tensor = parameter.detach()
    made = nn.Parameter(tensor.clone() if own else tensor, requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _refuse(model: nn.Module) -> None:
    """Refuse a model whose copy would not stand on its own."""
    if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise MethodError(
            "this base carries adapters already; give the bare model (of a PeftModel: unload() first), or a hybrid's"
            " create_hybrid_from_existing a model with a new layer"
        )
    path = next((path for path, module in model.named_modules() if "forward" in vars(module)), None)
    if path is not None:
        raise MethodError(
            f"the forward of {path or 'this model'} has been exchanged (accelerate's device_map and offloading do so), and a"
            " copy would run the original; load the model onto one device"
        )


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and lasting buffers: names, shapes, dtypes and bits.

    Args:
        model: A live model.

    Returns:
        The hexadecimal digest, the same on every device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {hash_tensor(tensor)}\n".encode())
    return digest.hexdigest()
