"""What a kernel holds only while it runs, and so does not show in its results.

Fake tensors know the results of an operation, not the scratch memory inside it. Two kinds are large enough to count, both
on the CPU only; each was found by comparing every operation with torch's profiler (`benchmarks/memory_prediction.py`).
"""

from __future__ import annotations

from typing import Any

import torch

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def carry_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation on fake tensors.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its named arguments.

    Returns:
        Its results. The experts' matrix product, of which torch's shape function knows bfloat16 alone though the kernel
        takes other dtypes, is asked in that.
    """
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        one, other, *rest = args
        product = func(one.to(torch.bfloat16), other.to(torch.bfloat16), *rest, **kwargs)
        return product.to(one.dtype)
    return func(*args, **kwargs)


def scratch_bytes(func: Any, args: tuple[Any, ...], device_type: str) -> int:
    """Memory inside a kernel beside its arguments and results.

    Args:
        func: The operation.
        args: Its positional arguments.
        device_type: "cpu", "cuda" or "mps".

    Returns:
        Bytes; 0 for nearly all operations.
    """
    if device_type != "cpu":
        return 0
    if torch.Tag.pointwise in func.tags:
        return _converted_operands(func, args)
    if func is _ATTENTION:
        return _attention_blocks(args[0], args[1], backward=False)
    if func is _ATTENTION_BACKWARD:
        return _attention_blocks(args[1], args[2], backward=True)
    return 0


def _converted_operands(func: Any, args: tuple[Any, ...]) -> int:
    """Copies of the operands of a pointwise operation over two dtypes.

    On the CPU such an operation first converts its operands to the common dtype, and an operation in place also computes
    into a result of that dtype; on CUDA conversion happens inside the kernel.

    Source: torch, aten/src/ATen/TensorIterator.cpp, `compute_types`.
    """
    operands = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim()]
    if len({operand.dtype for operand in operands}) < 2:
        return 0
    common = operands[0].dtype
    for operand in operands[1:]:
        common = torch.promote_types(common, operand.dtype)
    converted = [operand for operand in operands if operand.dtype != common]
    in_place = func.overloadpacket.__name__.endswith("_")
    if in_place and operands[0].dtype != common:
        converted.append(operands[0])
    return sum(operand.numel() for operand in converted) * common.itemsize


def _attention_blocks(query: torch.Tensor, key: torch.Tensor, *, backward: bool) -> int:
    """The blocks of the score matrix that each thread of the CPU's fused attention works on.

    Forward: the block, its row maxima and sums, and its part of the output, in float32. Backward: the block and its
    gradient. Half precisions have each block a second time.

    Args:
        query: (batch, heads, seq, head).
        key: (batch, heads, seq, head).
        backward: Whether it is the backward pass.

    Source: torch, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, `cpu_flash_attention` and its backward.
    """
    length, size = query.shape[-2:]
    rows = min(length, 256 if length >= 768 else 64 if length >= 192 else 32)
    block = rows * min(512, key.shape[-2])
    half = 0 if query.dtype in (torch.float32, torch.float64) else block * query.itemsize
    wide = max(4, query.itemsize)
    one = 2 * (wide * block + half) if backward else wide * (block + 2 * rows + rows * size) + half
    return torch.get_num_threads() * one
