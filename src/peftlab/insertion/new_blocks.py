"""A new block: the copy of a neighbour, made the identity without a module around it.

Pre-norm, where nothing stands behind the output projections but the sum: y = x + f(x) with the weights and biases of
f's output projections at zero, so y = x, and their gradients are those of a block that works. Everywhere else
y = x + g (block(x) - x) with a gate g that starts at zero. The gate is a parameter on the block, mixed in by a forward
hook: paths, classes, signatures and attributes stay those of the base's blocks.

Source: block expansion, Wu et al. 2024, LLaMA Pro, arXiv 2401.02415, section 3.2; the gate, Bachlechner et al. 2020,
ReZero, arXiv 2003.04887, section 3.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftlab.errors import MethodError

GATE = "residual_gate"
"""The gate's name on a gated block."""
MARK = "_is_new_block"
"""The attribute that tells a new block from the base's."""

_HALF = (torch.float16, torch.bfloat16)
_OPEN = "_autocasts"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copy_block(block: nn.Module, *, shared: Iterable[str] = (), kept: Iterable[Any] = ()) -> nn.Module:
    """A copy of a block with tensors of its own.

    Args:
        block: A block of the base.
        shared: Paths of modules in it that the copy has in common with it.
        kept: Objects outside the block that it refers to and that are not copied: configs.

    Returns:
        The copy, all its own tensors trainable; those of half precision are float32, as peft's adapters are: a step of
        2e-4 is lost on a bfloat16 weight near one.

    Raises:
        MethodError: The block cannot be copied: quantised, adapted, or run by accelerate's hooks.
    """
    _refuse(block)
    hooks = [hook for module in block.modules() for name in _HOOKS for hook in vars(module)[name].values()]
    common = [block.get_submodule(path) for path in shared]
    memo = {id(thing): thing for thing in (*hooks, *common, *kept)}
    for (
        module
    ) in block.modules():  # states that a recurrent layer has kept hang on a graph and cannot be copied
        left = [v for v in vars(module).values() if isinstance(v, torch.Tensor) and not v.is_leaf]
        memo |= {id(tensor): tensor.detach().clone() for tensor in left}
    made = copy.deepcopy(block, memo)
    for module in _own_modules(made, common):
        _drop_foreign_hooks(module)
    setattr(made, MARK, True)
    tensors = own_parameters(made, common)
    for parameter in tensors.values():
        parameter.grad = None
        parameter.requires_grad_(True)
        if parameter.dtype in _HALF:
            parameter.data = parameter.data.float()
    made.register_forward_pre_hook(_enter_precision, with_kwargs=True, prepend=True)
    made.register_forward_hook(_leave_block, with_kwargs=True, prepend=True, always_call=True)
    return made


def own_parameters(block: nn.Module, common: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a new block that are not the base's.

    Args:
        block: A new block.
        common: Modules in it that are the base's.

    Returns:
        Path in the block to parameter.
    """
    foreign = {id(p) for module in common for p in module.parameters()}
    return {name: p for name, p in block.named_parameters() if id(p) not in foreign}


def share_parameters(block: nn.Module, lent: Mapping[str, nn.Parameter]) -> None:
    """Put another new block's parameters into this one: the same storage, trained in both.

    Args:
        block: A new block.
        lent: Path in the block to parameter.
    """
    for name, parameter in lent.items():
        path, _, last = name.rpartition(".")
        block.get_submodule(path).register_parameter(last, parameter)


def scale_outputs(block: nn.Module, outputs: Iterable[str], factor: float) -> None:
    """Multiply the weights and biases of a block's output projections.

    Args:
        block: A new block.
        outputs: Paths of its output projections.
        factor: 0 makes a pre-norm block the identity.
    """
    with torch.no_grad():
        for path in outputs:
            for parameter in block.get_submodule(path).parameters():
                if factor == 0:
                    parameter.zero_()  # a product with zero would keep a minus sign, or a NaN
                else:
                    parameter.mul_(factor)


def make_plain(block: nn.Module, like: nn.Module) -> None:
    """Make a new block one of the base's for good: its hooks, mark and gate go, its tensors take the base's dtypes.

    Args:
        block: A new block; a gate in it is one.
        like: The base's block that it was copied from.
    """
    for hooks in (block._forward_pre_hooks, block._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (_enter_precision, _leave_block):
                hooks.pop(key)
                for kind in ("with_kwargs", "always_called"):
                    for more in ("_forward_pre_hooks", "_forward_hooks"):
                        vars(block).get(f"{more}_{kind}", {}).pop(key, None)
    for name in (MARK, _OPEN):
        vars(block).pop(name, None)
    block._parameters.pop(GATE, None)
    dtypes = {name: p.dtype for name, p in like.named_parameters()}
    common = {id(p) for p in like.parameters()}
    for path, module in block.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in common:
                continue
            dtype = dtypes.get(f"{path}.{name}" if path else name, parameter.dtype)
            own = parameter.detach().to(dtype, copy=True)  # shared blocks go on training elsewhere
            module._parameters[name] = nn.Parameter(own, requires_grad=True)


def draw_anew(block: nn.Module, owner: Any, common: Iterable[nn.Module], *, seed: int) -> None:
    """Give a new block the weights that its model would start from.

    Args:
        block: A new block.
        owner: The transformers model that the block's stack belongs to; its `_init_weights` is used.
        common: Modules in the block that are the base's and are left alone.
        seed: Seeds the values; the caller's random streams are left alone.
    """
    devices = sorted({p.device.index or 0 for p in block.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for module in _own_modules(block, common):
            for parameter in module.parameters(recurse=False):
                vars(parameter).pop("_is_hf_initialized", None)  # transformers leaves tensors so marked alone
            owner._init_weights(module)


def add_gate(block: nn.Module, value: float) -> None:
    """Put a gate on a new block: y = x + gate (block(x) - x).

    Args:
        block: A new block.
        value: Where it starts; 0 makes any block the identity.
    """
    like = next(block.parameters())  # float32, or wider where the base is
    block.register_parameter(GATE, nn.Parameter(torch.full((), value, dtype=like.dtype, device=like.device)))


def _own_modules(block: nn.Module, common: Iterable[nn.Module]) -> list[nn.Module]:
    foreign = {id(inner) for module in common for inner in module.modules()}
    return [module for module in block.modules() if id(module) not in foreign]


def _refuse(block: nn.Module) -> None:
    """Refuse a block whose copy would not be a block of its own."""
    for path, module in block.named_modules():
        where = path or type(block).__name__
        if hasattr(module, "base_layer"):
            raise MethodError(
                f"no new block: {where} carries an adapter; add the block to the bare base (hybrid adds LoRA)"
            )
        if "forward" in vars(module):
            raise MethodError(
                f"no new block: the forward of {where} has been exchanged (accelerate's device_map and offloading do"
                " so), and a copy would run the original; load the model onto one device"
            )
    fixed = next((name for name, p in block.named_parameters() if not p.is_floating_point()), None)
    if fixed is not None:
        raise MethodError(f"no new block: {fixed} is quantised and its copy could not be trained")


def _drop_foreign_hooks(module: nn.Module) -> None:
    """Keep the hooks by which transformers collects hidden states; take off those of whoever watches the original."""
    for name in _HOOKS:
        hooks: dict[int, Any] = vars(module)[name]
        for key, hook in list(hooks.items()):
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                del hooks[key]


def stream_of(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The residual stream that a block is given: the first argument of its forward, by place or by name.

    Args:
        block: A block.
        args: Positional arguments of a call.
        kwargs: Named arguments of a call.

    Returns:
        The hidden states.
    """
    if args:
        return args[0]
    names = list(inspect.signature(type(block).forward).parameters)
    return kwargs[names[1]]


def _enter_precision(block: nn.Module, args: Any, kwargs: Any) -> None:
    """Compute a float32 block in the precision of the half-precision stream that it is given."""
    stream = stream_of(block, args, kwargs)
    entered = vars(block).setdefault(_OPEN, [])
    mixed = stream.dtype in _HALF and any(p.dtype == torch.float32 for p in block.parameters())
    if mixed and torch.amp.is_autocast_available(stream.device.type):
        context: Any = torch.autocast(stream.device.type, dtype=stream.dtype)
        context.__enter__()
        entered.append(context)
    else:
        entered.append(None)


def _leave_block(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """End what `_enter_precision` began, mix the gate in, and give the stream back in its own dtype."""
    entered = vars(block).get(_OPEN)
    context = entered.pop() if entered else None
    if context is not None:
        context.__exit__(None, None, None)
    if output is None:  # the forward has failed and the hook is called to clean up
        return None
    several = isinstance(output, tuple | list)
    first = output[0] if several else output
    stream = stream_of(block, args, kwargs)
    gate = getattr(block, GATE, None)
    mixed = first if gate is None else stream + gate.to(first.dtype) * (first - stream)
    mixed = mixed.to(stream.dtype)
    return type(output)([mixed, *output[1:]]) if several else mixed
