"""A model's fingerprint: everything that decides what its blocks put out, as one digest.

Weights are read where they lie, at about the speed of memory. Each 32-bit word is multiplied by a random 64-bit number
that belongs to its place, and the products of a piece are added up: words that change places change the sum. Two tensors
that differ have equal sums with a chance of 2**-33 at most.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch

_WORDS = 1 << 18
"""Words of a piece: it and what is made of it stay in the cache of a core."""
_NOT_DECISIVE = (
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
)


def fingerprint(model: Any) -> str:
    """SHA-256 of everything about a model that decides what its blocks put out.

    Args:
        model: A transformers model, bare or wrapped by peft.

    Returns:
        The hexadecimal digest of: config, library versions, devices, which adapters are on and how strong they are, and of
        every tensor its name, shape, dtype and bits in their order.
    """
    told = [
        _plain(model.config.to_dict()),
        str(model.config._attn_implementation),
        *(metadata.version(library) for library in ("torch", "transformers")),
        *(
            f"{name} {_plain(config.to_dict())}"
            for name, config in sorted((getattr(model, "peft_config", None) or {}).items())
        ),
    ]
    for name, module in model.named_modules():
        adapters = getattr(module, "active_adapters", None)
        if hasattr(module, "disable_adapters") and not callable(adapters):
            merged, scaling = getattr(module, "merged", None), getattr(module, "scaling", None)
            told.append(f"{name} {adapters} {module.disable_adapters} {merged} {scaling}")
    told.append(str(getattr(model, "_adapters_disabled", False)))
    tensors = dict(model.named_buffers()) | model.state_dict()  # not every buffer is in the state
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            told.append(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type} {hash_tensor(tensor)}"
            )
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def hash_tensor(tensor: torch.Tensor) -> str:
    """A digest of a tensor's bits in their order.

    Args:
        tensor: Any dense tensor.

    Returns:
        Hexadecimal digits, the same on every device.
    """
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 4:  # a view into something else, where words do not begin
        octets = octets.clone()
    factors = _factors(octets.device)
    products = torch.empty_like(factors)  # used again for each piece: new memory costs more than the product
    sums = []
    for start in range(0, octets.numel(), 4 * _WORDS):
        piece = octets[start : start + 4 * _WORDS]
        if piece.numel() % 4:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 4))
        words = piece.view(torch.int32)
        sums.append(torch.mul(words, factors[: len(words)], out=products[: len(words)]).sum())
    found = torch.stack(sums).tolist() if sums else []  # one wait for the device
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> torch.Tensor:
    """A random number for each place of a piece, the same in every process."""
    source = torch.Generator().manual_seed(0x5EED)
    ends = torch.iinfo(torch.int64)
    return torch.randint(ends.min, ends.max, (_WORDS,), generator=source, dtype=torch.int64).to(device)


def _plain(config: dict[str, Any]) -> str:
    """A config as text, without what decides nothing; sets in order, which differs between processes."""
    kept = {key: value for key, value in config.items() if key not in _NOT_DECISIVE}
    return json.dumps(
        kept, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v)
    )
