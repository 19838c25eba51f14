"""Law 1, shown to train: every active tensor trains within K steps, every inactive one stands still.

K is 1 + the number of zero-initialised factors on a tensor's path: LoRA's A stands behind B = 0 and needs 2 steps.
Steps with a learning rate of zero do not count. Tensors that the forward pass cannot reach are named and made
untrainable. Active tensors are compared with a copy, inactive ones with a fingerprint of their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peftlab.errors import NonFiniteError, NotTrainingError
from peftlab.gradients import Reading

_SHOWN = 6
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class PhaseProof:
    """What was shown of one phase.

    Attributes:
        phase: Its name.
        tensors: Active tensors that were seen to train.
        steps_needed: Steps of non-zero learning rate it took.
        unreached: Active tensors that the forward pass does not reach; made untrainable.
    """

    phase: str
    tensors: int
    steps_needed: int
    unreached: tuple[str, ...]


class TrainingProof:
    """Watches one phase at a time.

    Args:
        parameters: Every tensor of the adapter, by name.
        steps_to_train: Law 1's K for a name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], steps_to_train: Callable[[str], int]) -> None:
        self._parameters, self._steps_to_train = parameters, steps_to_train
        self._frozen: dict[str, int] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._seen: set[str] = set()
        self._reached: set[str] = set()
        self._unreached: tuple[str, ...] = ()
        self._phase, self._steps, self._open = "", 0, False

    @property
    def is_open(self) -> bool:
        """Whether the phase's active tensors are still to be shown to train."""
        return self._open

    def enter(self, phase: str) -> None:
        """Begin a phase: which tensors are active is read from `requires_grad`.

        Args:
            phase: The phase's name.

        Raises:
            NotTrainingError: A tensor that was frozen through the phase before has changed, or nothing is active.
        """
        self.check_frozen()
        active = {name: p for name, p in self._parameters.items() if p.requires_grad}
        if not active:
            raise NotTrainingError(
                f"phase '{phase}' trains nothing: no adapter tensor belongs to its groups and layers"
            )
        self._before = {name: p.detach().clone() for name, p in active.items()}
        self._frozen = {name: fingerprint(p) for name, p in self._parameters.items() if name not in active}
        self._seen, self._reached, self._unreached = set(), set(), ()
        self._phase, self._steps, self._open = phase, 0, True

    def observe(self, reading: Reading, *, step: int) -> None:
        """Look at the gradients of one step, before the optimizer moves.

        Args:
            reading: The gradient norms of all adapter tensors.
            step: The optimizer step, for messages.

        Raises:
            NonFiniteError: A gradient holds NaN or an infinity.
            NotTrainingError: A frozen tensor has a gradient.
        """
        bad = reading.not_finite()
        if bad:
            raise NonFiniteError(f"step {step}: the gradient is not finite in {_some(bad)}")
        if not self._open:
            return
        moved = sorted(self._frozen.keys() & reading.norms.keys())
        if moved:
            raise NotTrainingError(
                f"step {step}, phase '{self._phase}': frozen tensors have gradients: {_some(moved)}"
            )
        self._reached |= reading.norms.keys()
        self._seen |= {name for name, norm in reading.norms.items() if norm > 0}

    def after_step(self, *, learning_rate: float, step: int) -> PhaseProof | None:
        """Look at the tensors after the optimizer has moved.

        Args:
            learning_rate: The learning rate the step was taken with.
            step: The optimizer step, for messages.

        Returns:
            The proof, once, when every active tensor has been seen to train; else None.

        Raises:
            NotTrainingError: A tensor has not trained within its K steps.
        """
        if not self._open or learning_rate == 0:
            return None
        self._steps += 1
        late, absent, waiting = {}, [], False
        for name, before in self._before.items():
            if name in self._seen and not torch.equal(before, self._parameters[name].detach()):
                continue
            if self._steps < self._steps_to_train(name):
                waiting = True
            elif name not in self._reached:
                absent.append(name)
            else:
                late[name] = "its gradient was zero" if name not in self._seen else "it did not change"
        self._leave_out(absent)
        if late:
            what = "; ".join(f"{name}: {why}" for name, why in list(late.items())[:_SHOWN])
            more = f" (+{len(late) - _SHOWN} more)" if len(late) > _SHOWN else ""
            raise NotTrainingError(
                f"step {step}, phase '{self._phase}': {len(late)} active tensors did not train in {self._steps} steps:"
                f" {what}{more}. If the learning rate is as meant, raise it or check the targets."
            )
        if waiting:
            return None
        proof = PhaseProof(self._phase, len(self._before), self._steps, self._unreached)
        self._before, self._open = {}, False
        return proof

    def check_frozen(self) -> None:
        """Compare the phase's frozen tensors with what they were on entry.

        Raises:
            NotTrainingError: One has changed.
        """
        changed = [name for name, mark in self._frozen.items() if fingerprint(self._parameters[name]) != mark]
        if changed:
            raise NotTrainingError(f"phase '{self._phase}': frozen tensors have changed: {_some(changed)}")

    def _leave_out(self, names: list[str]) -> None:
        """Make tensors untrainable that no forward pass of their K steps has reached."""
        if names and len(names) == len(self._before):
            raise NotTrainingError(f"phase '{self._phase}': the forward pass reaches none of its tensors")
        for name in names:
            self._parameters[name].requires_grad_(False)
            del self._before[name]
        self._unreached += tuple(names)


def fingerprint(tensor: torch.Tensor) -> int:
    """A number that changes with any bit of a tensor (up to chance 2^-64), computed where the tensor lies.

    Args:
        tensor: Any dense tensor.

    Returns:
        A 64-bit integer.
    """
    words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = 0
    for start in range(0, words.numel(), _CHUNK_BYTES):
        chunk = words[start : start + _CHUNK_BYTES]
        chunk = torch.nn.functional.pad(chunk, (0, -chunk.numel() % 4))
        values = chunk.view(torch.int32).to(torch.int64)
        places = torch.arange(start + 1, start + values.numel() + 1, device=values.device, dtype=torch.int64)
        mixed = (values + 0x1234567) * (places * 0x1E3779B97F4A7C15 | 1)
        total += int((mixed ^ (mixed >> 29)).sum().item())
    return total & (2**64 - 1)


def _some(names: list[str]) -> str:
    """The first few names."""
    more = f" (+{len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
