"""Where the trainers of several runs meet: each goes its own way up to a pass, the pass is computed once for all.

Each trainer has a thread, and one of them runs at a time: the order of everything is fixed. A run's gradients are in place
only while it has its turn, so clipping and clearing see its own alone. A run that fails leaves; the others go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftlab.isolation import Isolation
from peftlab.joint.adapters import JoinedAdapters
from peftlab.joint.losses import joint_loss
from peftlab.joint.shares import Batch, Shares, join_batches
from peftlab.joint.streams import DividedDraws, Stream


class Closed(BaseException):
    """The meeting is over before the run is: its thread unwinds."""


@dataclass(slots=True)
class Seat:
    """One run's place.

    Attributes:
        parameters: What the run trains.
        turn: Given when the run may go on.
        back: Given when it has come to a pass, or to its end.
        gradients: Its gradients, while others have their turn.
        batch: What it brings to the pass.
        terms: How many loss terms its step has.
        stream: Where its random stream stands.
        loss: What the pass gave.
        is_over: Whether it has come to its end.
        error: What ended it, where that was an error.
    """

    parameters: tuple[nn.Parameter, ...]
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    batch: Batch = field(default_factory=dict)
    terms: int = 0
    stream: Stream | None = None
    loss: torch.Tensor | None = None
    is_over: bool = False
    error: BaseException | None = None


class Meeting:
    """Computes the passes of several runs over one base.

    Args:
        joined: Their adapters on the base.
        pad_id: The token that fills padded batches.
        isolation: Keeps the rows of packed batches apart; None where they are padded.
    """

    def __init__(self, joined: JoinedAdapters, *, pad_id: int, isolation: Isolation | None) -> None:
        self.joined, self.pad_id, self.isolation = joined, pad_id, isolation
        self.loss = joint_loss(joined.model, joined.head)
        self._device = next(joined.model.parameters()).device
        self._seats: dict[str, Seat] = {}
        self._is_closed = False

    def compute(self, name: str, batch: Batch, terms: int) -> torch.Tensor:
        """A run's loss in the next pass; its gradients are there when this returns. For the run's own thread.

        Args:
            name: The run.
            batch: Its batch, on the device; torch's generators stand at the beginning of its random stream.
            terms: Loss terms of its whole step.

        Returns:
            The batch's share of the step's mean, without a graph.
        """
        seat = self._seats[name]
        seat.batch, seat.terms, seat.stream = batch, terms, Stream(self._device)
        seat.back.release()
        seat.turn.acquire()
        if self._is_closed or seat.loss is None:
            raise Closed
        loss, seat.loss = seat.loss, None
        return loss

    def hold(
        self, runs: Mapping[str, tuple[Callable[[], Any], tuple[nn.Parameter, ...]]]
    ) -> dict[str, BaseException]:
        """Carry runs out.

        Args:
            runs: Name to what carries the run out, calling `compute` at its passes, and to what it trains.

        Returns:
            Name to the error of each run that failed.
        """
        self._seats = {name: Seat(parameters) for name, (_, parameters) in runs.items()}
        threads = [
            threading.Thread(target=self._sit, args=(name, act), name=f"run {name}", daemon=True)
            for name, (act, _) in runs.items()
        ]
        self._is_closed, self._threads_of_torch = False, torch.get_num_threads()
        for thread in threads:
            thread.start()
        try:
            for seat in self._seats.values():
                seat.gradients = [None] * len(seat.parameters)
                self._give_turn(seat)
            while live := {name: seat for name, seat in self._seats.items() if not seat.is_over}:
                self._pass(live)
                for seat in live.values():
                    self._give_turn(seat)
        finally:
            self._is_closed = True
            for seat in self._seats.values():
                seat.turn.release()
            for thread in threads:
                thread.join()
        return {name: seat.error for name, seat in self._seats.items() if seat.error is not None}

    def _sit(self, name: str, act: Callable[[], Any]) -> None:
        """One run's thread."""
        seat = self._seats[name]
        seat.turn.acquire()
        try:
            if not self._is_closed:
                torch.set_num_threads(self._threads_of_torch)
                act()
        except Closed:
            seat.is_over = True
        except BaseException as error:  # noqa: BLE001 told by `hold`, in the caller's thread
            seat.error = error
        finally:
            seat.is_over = True
            seat.back.release()

    def _give_turn(self, seat: Seat) -> None:
        """Let one run go on to its next pass, with its gradients."""
        for parameter, gradient in zip(seat.parameters, seat.gradients, strict=True):
            parameter.grad = gradient
        seat.turn.release()
        seat.back.acquire()
        self._take_gradients(seat)

    def _take_gradients(self, seat: Seat) -> None:
        """Keep a run's gradients aside."""
        seat.gradients = [parameter.grad for parameter in seat.parameters]
        for parameter in seat.parameters:
            parameter.grad = None

    def _pass(self, live: Mapping[str, Seat]) -> None:
        """One forward and backward pass over the rows of all."""
        for seat in live.values():
            for parameter, gradient in zip(seat.parameters, seat.gradients, strict=True):
                parameter.grad = gradient
        losses = self._losses(live)
        if not torch.isfinite(torch.stack(list(losses.values()))).all():
            # zero times what is not finite is no zero: each has a pass of its own, and what is broken stays where it is
            losses = {name: self._losses({name: seat})[name] for name, seat in live.items()}
        sound = [loss for loss in losses.values() if torch.isfinite(loss)]
        if sound:
            torch.autograd.backward(sound)
        for name, seat in live.items():
            seat.loss = losses[name].detach()
            self._take_gradients(seat)

    def _losses(self, live: Mapping[str, Seat]) -> dict[str, torch.Tensor]:
        """Each run's share of its step's mean, with the graph of all."""
        batch, shares = join_batches({name: seat.batch for name, seat in live.items()}, pad_id=self.pad_id)
        streams = {name: seat.stream.copied() for name, seat in live.items() if seat.stream is not None}
        totals = self.totals(batch, shares, DividedDraws(shares, streams))
        return {
            name: total * (1 / seat.terms) for total, (name, seat) in zip(totals, live.items(), strict=True)
        }

    def totals(self, batch: Batch, shares: Shares, draws: DividedDraws | None = None) -> list[torch.Tensor]:
        """The sum of each run's loss terms in a joint batch."""
        with self.joined.room.entered(shares, draws):
            if self.isolation is None:
                return self.loss.totals(self.joined.model, batch, shares)
            with self.isolation.rows(batch["position_ids"]):
                return self.loss.totals(self.joined.model, batch, shares)
