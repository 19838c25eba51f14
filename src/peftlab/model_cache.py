"""Loaded models, up to a limit: the least recently used leaves first, and leaving is proved.

Unloading shows that the model and the storages of its weights died, and what the process gave back. Where something
outside still holds them, the report says what.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from peftlab.devices import report_memory, storage_bytes
from peftlab.errors import ConfigError, ModelError, UnknownNameError
from peftlab.memory.holders import name_holders


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """What unloading a model gave back.

    Attributes:
        name: The model.
        weights_bytes: Bytes of its weights.
        loading_bytes: By how much loading it made this process's resident memory grow.
        before_bytes: This process's resident memory before unloading.
        after_bytes: The same afterwards.
        died: Whether the model and the storages of all its weights are gone.
        holders: What still holds them, in words; empty where they died.
        device_before_bytes: Bytes of tensors on the CUDA device before; None without one.
        device_after_bytes: The same afterwards.
    """

    name: str
    weights_bytes: int
    loading_bytes: int
    before_bytes: int
    after_bytes: int
    died: bool
    holders: tuple[str, ...] = ()
    device_before_bytes: int | None = None
    device_after_bytes: int | None = None

    @property
    def given_back_bytes(self) -> int:
        """Resident memory of this process that was given back to the host."""
        return self.before_bytes - self.after_bytes

    @property
    def given_back(self) -> float | None:
        """Share of what loading took that was given back; None where loading took nothing of the host."""
        return self.given_back_bytes / self.loading_bytes if self.loading_bytes > 0 else None

    def __str__(self) -> str:
        """One sentence."""
        share = "" if self.given_back is None else f" of the {self.loading_bytes:,} that loading took"
        end = "it died" if self.died else f"it lives on, held by {'; '.join(self.holders)}"
        return f"{self.name}: {self.given_back_bytes:,} bytes given back{share}; {end}"


@dataclass(slots=True)
class _Loaded:
    """A loaded model.

    Attributes:
        model: The model.
        weights_bytes: Bytes of its weights.
        loading_bytes: By how much loading made the process grow.
    """

    model: nn.Module
    weights_bytes: int
    loading_bytes: int


class ModelCache:
    """Keeps loaded models by name, up to a limit.

    Args:
        limit_bytes: Most bytes of weights in all models together; None sets no limit.
        limit_models: Most models; None sets no limit.

    Raises:
        ConfigError: A limit that leaves room for nothing.

    Attributes:
        evicted: The reports of the models that had to leave, oldest first.
    """

    def __init__(self, *, limit_bytes: int | None = None, limit_models: int | None = None) -> None:
        for name, limit in (("limit_bytes", limit_bytes), ("limit_models", limit_models)):
            if limit is not None and limit < 1:
                raise ConfigError(
                    f"{name} is {limit}: a cache must have room for one model; None sets no limit"
                )
        self.limit_bytes, self.limit_models = limit_bytes, limit_models
        self.evicted: list[UnloadReport] = []
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    def __iter__(self) -> Iterator[str]:
        """The names, least recently used first."""
        return iter(tuple(self._loaded))

    def sizes(self) -> dict[str, int]:
        """Bytes of weights of each model, least recently used first."""
        return {name: loaded.weights_bytes for name, loaded in self._loaded.items()}

    def get(
        self, name: str, load: Callable[[], nn.Module], *, expected_bytes: int | None = None
    ) -> nn.Module:
        """A model, loaded where it is not there yet; others leave where the limit asks for it.

        Args:
            name: What it is kept under.
            load: Loads it.
            expected_bytes: Bytes of its weights, where they are known before: then room is made first.

        Returns:
            The model. A caller that keeps it keeps it alive after it has left the cache.

        Raises:
            ModelError: It is larger than the limit alone.
        """
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name].model
        self._make_room(name, expected_bytes or 0)
        give_memory_back()
        before = report_memory().process_bytes
        model = load()
        grown = report_memory().process_bytes - before
        size = storage_bytes(chain(model.parameters(), model.buffers()))
        self._make_room(name, size)
        self._loaded[name] = _Loaded(model, size, grown)
        return model

    def unload(self, name: str) -> UnloadReport:
        """Let go of a model and prove that it died.

        Args:
            name: What it is kept under.

        Returns:
            What it gave back, and who holds it where it did not die.

        Raises:
            UnknownNameError: It is not in the cache.
        """
        if name not in self._loaded:
            raise UnknownNameError("loaded model", name, self._loaded)
        loaded = self._loaded.pop(name)
        size, grown = loaded.weights_bytes, loaded.loading_bytes
        model_reference = weakref.ref(loaded.model)
        storages = [
            weakref.ref(tensor.untyped_storage())
            for tensor in chain(loaded.model.parameters(), loaded.model.buffers())
        ]
        before = report_memory()
        del loaded
        give_memory_back()
        after = report_memory()
        died = model_reference() is None and not any(reference() is not None for reference in storages)
        return UnloadReport(
            name,
            size,
            grown,
            before.process_bytes,
            after.process_bytes,
            died,
            () if died else name_holders(model_reference(), storages),
            before.device_allocated_bytes,
            after.device_allocated_bytes,
        )

    def clear(self) -> list[UnloadReport]:
        """Unload every model.

        Returns:
            Their reports, least recently used first.
        """
        return [self.unload(name) for name in self]

    def _make_room(self, name: str, size: int) -> None:
        """Have the least recently used models leave until one more of a size fits."""
        if self.limit_bytes is not None and size > self.limit_bytes:
            raise ModelError(
                f"'{name}' takes {size:,} bytes and the cache may hold {self.limit_bytes:,}; raise its limit"
            )
        while self._loaded and self._too_full(size):
            self.evicted.append(self.unload(next(iter(self._loaded))))

    def _too_full(self, size: int) -> bool:
        """Whether one more model of a size would pass a limit."""
        total = size + sum(loaded.weights_bytes for loaded in self._loaded.values())
        return (self.limit_bytes is not None and total > self.limit_bytes) or (
            self.limit_models is not None and len(self._loaded) >= self.limit_models
        )


def give_memory_back() -> None:
    """Collect garbage and return to host and device what no object uses: glibc and CUDA's allocator keep it else."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
