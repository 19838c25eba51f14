"""An account of every storage that lives while tensors without data are computed with.

The ledger notes when each storage is born, what it is for, and when it dies, by weak reference; it works where tensors are
frozen, which `torch.distributed._tools.MemTracker` does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.memory.kernels import carry_out, scratch_bytes

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"
ACTIVATIONS, COPIES, TEMPORARY = "activations", "copies", "temporary"
PARTS: Mapping[str, str] = {
    WEIGHTS: "parameters and buffers of the base and the adapter",
    GRADIENTS: "the gradients of what trains",
    OPTIMIZER: "what the optimizer remembers of every trained tensor",
    ACTIVATIONS: "what the forward pass keeps for the backward pass",
    COPIES: "the batch, and the copies by which training is proved",
    TEMPORARY: "the rest that lives at the peak: gradients of activations, recomputed blocks, scratch memory of kernels",
}
"""What memory is used for, in the order of tables."""

FORWARD, BACKWARD, UPDATE, BETWEEN = "forward pass", "backward pass", "optimizer step", "between steps"
"""When something happens."""

_ITEM, _EQUAL = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default
_DEVICE = torch.ops.prim.device.default
_JOIN = torch.ops.aten.cat.default
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)
"""How a number written in code becomes a tensor: these take one that has data."""


@dataclass(slots=True)
class _Storage:
    """One storage; times are counts of births and deaths.

    Attributes:
        size: Its bytes.
        moment: When it was made.
        part: What it is for.
        born: The time of its birth.
        died: The time of its death; None while it lives.
        reference: A weak reference to it.
        has_pads: Whether it says of tokens which are pads, and some are.
    """

    size: int
    moment: str
    part: str
    born: int
    died: int | None
    reference: weakref.ref[torch.UntypedStorage] | None
    has_pads: bool = False


@dataclass(frozen=True, slots=True)
class Peak:
    """The instant at which most was in use.

    Attributes:
        total_bytes: Bytes in use.
        parts: What they were for: every key of `PARTS` to bytes; they sum to the total.
        moment: When it was.
        operation: What was computed, e.g. "aten.mm.default".
    """

    total_bytes: int
    parts: dict[str, int]
    moment: str
    operation: str


class StorageLedger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of fake tensors; is to be entered inside an active `FakeTensorMode`.

    Questions that need data are answered as they are where training goes well: a number is one and a truth is true,
    save of a mask that has pads: not all of it is true.

    Args:
        device_type: The device whose kernels are meant: "cpu", "cuda" or "mps".
        is_equal: Answers whether two tensors are equal.
    """

    def __init__(self, device_type: str, is_equal: Callable[[torch.Tensor, torch.Tensor], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.moment, self._is_equal = device_type, BETWEEN, is_equal
        self._all: list[_Storage] = []
        self._alive: dict[int, _Storage] = {}
        self._stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._time = self._live = 0
        self._highest, self._scratch, self._when = 0, 0, 0
        self._what = ("", "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one operation and note what it made."""
        if func is _DEVICE:  # asked more often than everything else together
            return args[0].fake_device
        if func is _ITEM:
            return self._answer(args[0])
        if func is _EQUAL:
            return self._is_equal(*args)
        if any(type(arg) is torch.Tensor for arg in args) and func not in _LIFTS:
            args = tuple(self._stand_in(arg) if type(arg) is torch.Tensor else arg for arg in args)
        results = carry_out(func, args, kwargs or {})
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                self.note(result)
                # virtual tokens are joined to a mask as ones, and in peft these are floats
                can_mask = func is _JOIN or not result.is_floating_point()
                if can_mask and any(self._has_pads(argument) for argument in args):
                    self.mark_pads(result)
        scratch = scratch_bytes(func, args, self.device_type)
        if self._live + scratch > self._highest:
            self._highest, self._scratch, self._when = self._live + scratch, scratch, self._time
            self._what = (self.moment, str(func))
        return results

    def note(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Note a tensor's storage, or say what a noted one is for.

        Args:
            tensor: A fake tensor.
            part: A key of `PARTS`; None leaves it to the moment.
        """
        storage = tensor.untyped_storage()
        key = id(storage)  # taken out when the storage dies, so it never stands for another one
        known = self._alive.get(key)
        if known is None:
            self._time += 1
            part = part or (COPIES if self.moment == BETWEEN else TEMPORARY)
            reference = weakref.ref(storage, lambda _: self._forget(key))
            known = _Storage(storage.nbytes(), self.moment, part, self._time, None, reference)
            self._alive[key] = known
            self._all.append(known)
            self._live += known.size
        elif part is not None:
            known.part = part

    def mark_pads(self, mask: torch.Tensor) -> None:
        """Say that a mask has pads, and so has every mask made of it.

        Args:
            mask: A noted fake tensor of whole numbers or truths, or such a one behind ones.
        """
        self._alive[id(mask.untyped_storage())].has_pads = True

    def _has_pads(self, value: Any) -> bool:
        """Whether a value is a mask that has pads, or masks of which one has."""
        if isinstance(value, list):
            return any(self._has_pads(one) for one in value)
        if not isinstance(value, torch.Tensor):
            return False
        known = self._alive.get(id(value.untyped_storage()))
        return known is not None and known.has_pads

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake in the place of a tensor that a model keeps beside its parameters and buffers."""
        if id(tensor) not in self._stand_ins:  # it is kept too, so that no other one gets its id
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            self.note(fake, WEIGHTS)
            self._stand_ins[id(tensor)] = (tensor, fake)
        return self._stand_ins[id(tensor)][1]

    def _answer(self, scalar: torch.Tensor) -> bool | float | int:
        """The value of a scalar that has none."""
        if scalar.dtype == torch.bool:
            return not self._has_pads(scalar)
        return 1.0 if scalar.is_floating_point() else 1

    def _forget(self, key: int) -> None:
        """Note that a storage has died."""
        self._time += 1
        storage = self._alive.pop(key)
        storage.died, storage.reference = self._time, None
        self._live -= storage.size

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A block that is a forward pass; what it made and has not given back at its end are activations."""
        self.moment = FORWARD
        yield
        for storage in self._alive.values():
            if storage.moment == FORWARD and storage.part == TEMPORARY:
                storage.part = ACTIVATIONS
        self.moment = BACKWARD

    def peak(self) -> Peak:
        """The instant at which most was in use since the ledger began."""
        parts = dict.fromkeys(PARTS, 0)
        for storage in self._all:
            if storage.born <= self._when and (storage.died is None or storage.died > self._when):
                parts[storage.part] += storage.size
        parts[TEMPORARY] += self._scratch
        moment, operation = self._what
        return Peak(self._highest, parts, moment, operation)
