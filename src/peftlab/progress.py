"""What a person sees while a run goes on, and what the event log keeps of it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from peftlab.trainer import LabTrainer


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Writes steps and validations to the event log, draws the progress bar, stops early, stops on a signal.

    Args:
        patience: Validations without a lower loss after which training stops; None never stops.
        quiet: Whether nothing is drawn (processes other than the first).
    """

    def __init__(self, *, patience: int | None, quiet: bool = False) -> None:
        self.patience, self.quiet = patience, quiet
        self.trainer: LabTrainer | None = None
        self.stopped_by: str | None = None
        self._bar: Any = None
        self._began = 0.0
        self.tokens_before = 0
        self._handlers: dict[int, Any] = {}

    def watch(self, trainer: LabTrainer) -> None:
        """Tell which trainer to read.

        Args:
            trainer: The trainer this callback was given to.
        """
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar and listen for signals."""
        self._began = time.perf_counter()
        self.tokens_before = self._tokens
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=self.quiet,
            file=sys.stderr, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15,
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._handlers[number] = signal.signal(number, self._stop)
            except ValueError:  # not the main thread (a notebook's worker): the caller keeps its own handling
                break

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Remember that a stop was asked for; a second one ends the process as usual."""
        self.stopped_by = signal.Signals(number).name
        signal.signal(number, self._handlers[number])

    @property
    def _tokens(self) -> int:
        """Tokens trained on so far."""
        return self.trainer.num_tokens if self.trainer is not None else 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar; ask for a last validation and checkpoint at the end, or a checkpoint when stopped."""
        self._bar.update(1)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if self._stop_wanted(args):
            control.should_save = control.should_training_stop = True

    def _stop_wanted(self, args: TrainingArguments) -> bool:
        """Whether any process was asked to stop; all answer alike, so that none waits for one that has left."""
        wanted = self.stopped_by is not None
        if args.world_size == 1 or self.trainer is None:
            return wanted
        count = self.trainer.accelerator.reduce(
            torch.tensor(int(wanted), device=args.device), reduction="sum"
        )
        if int(count) and self.stopped_by is None:
            self.stopped_by = "a signal to another process"
        return bool(int(count))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Write a step to the event log and its loss to the bar."""
        if not logs or "loss" not in logs or self.trainer is None:
            return
        seconds = time.perf_counter() - self._began - self.trainer.aside_seconds
        rate = (self._tokens - self.tokens_before) / seconds
        phase = self.trainer.parts.schedule.phase_at(state.global_step - 1).name
        self._bar.set_postfix(
            loss=f"{logs['loss']:.3f}", phase=phase, **{"tok/s": f"{rate:,.0f}"}, refresh=False
        )
        self.trainer.parts.event(
            "step",
            step=state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            gradient_norm_clipped_at=args.max_grad_norm or None,
            tokens=self._tokens,
            tokens_per_second=round(rate, 1),
            seconds=round(seconds, 3),
            phase=phase,
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **_: Any,
    ) -> None:
        """Write the validation loss; keep a new best; stop when patience is spent."""
        if self.trainer is None or metrics is None:
            return
        loss = metrics["eval_loss"]
        phase = self.trainer.parts.schedule.phase_at(max(0, state.global_step - 1)).name
        self.trainer.parts.event("validated", step=state.global_step, validation_loss=loss, phase=phase)
        complete = self.trainer.parts.attachment.is_complete
        if complete(state.global_step) and (state.best_metric is None or loss < state.best_metric):
            control.should_save = True
        if self.patience is not None and _since_best(state, complete) >= self.patience:
            control.should_training_stop = control.should_save = self.trainer.stopped_early = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar and give signals back."""
        self.close()

    def close(self) -> None:
        """Close the bar and give signals back; also after a failure."""
        if self._bar is not None:
            self._bar.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _since_best(state: TrainerState, complete: Callable[[int], bool]) -> int:
    """Validations of a complete adapter since the lowest loss, read from the log, so a resumed run counts on."""
    history = state.log_history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry and complete(entry["step"])]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
