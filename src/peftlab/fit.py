"""Train or go on: the part of a run between the adapter's start and the choice of its best checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import distributed

from peftlab.checkpoint import last_good_checkpoint
from peftlab.devices import num_processes, process_rank
from peftlab.errors import Interrupted
from peftlab.files import write_json
from peftlab.progress import RunCallback
from peftlab.run import RunFolder
from peftlab.trainer import LabTrainer

_FINISHED = "finished.json"


def wait_for_all() -> None:
    """Wait for all processes of a distributed run."""
    if num_processes() > 1:
        distributed.barrier()


@dataclass(slots=True)
class Fit:
    """The training part of a run.

    Attributes:
        run: The run folder.
        trainer: The trainer.
        callback: Its progress.
        show: Receives the lines for the person.
        seconds: Time of each part so far; "train" is added.
    """

    run: RunFolder
    trainer: LabTrainer
    callback: RunCallback
    show: Callable[[str], None]
    seconds: dict[str, float]

    def carry_out(self, *, select_best: bool) -> dict[str, Any]:
        """Train, go on, or read what a finished training left; the chosen adapter is in place afterwards.

        Args:
            select_best: Whether the adapter of the lowest validation loss is chosen, else the last one.

        Returns:
            What the summary says of it.

        Raises:
            Interrupted: A signal stopped it; a checkpoint was saved.
        """
        run, first = self.run, process_rank() == 0
        record = run.checkpoints / _FINISHED
        if record.exists():
            done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            self._choose(done, select_best=select_best)
            return done
        checkpoint, problems = last_good_checkpoint(run.checkpoints)
        for problem in problems:
            self.show(f"a checkpoint was left out: {problem}")
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if first:
            run.drop_events_after(step)
        if checkpoint is not None and first:
            run.append_event("resumed", step=step)
            self.show(f"going on after step {step}")
        wait_for_all()
        began, tokens = time.perf_counter(), self.trainer.num_tokens
        try:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.callback.close()
        self.seconds["train"] = time.perf_counter() - began
        if (
            self.callback.stopped_by is not None
            and self.trainer.state.global_step < self.trainer.state.max_steps
        ):
            raise Interrupted(
                f"{self.callback.stopped_by}: stopped after step {self.trainer.state.global_step}, saved; go on with"
                f" peftlab run --resume {run.path}"
            )
        done = self._describe(tokens)
        self._choose(done, select_best=select_best)
        if first:
            for probe in self.trainer.parts.probes.values():
                probe.write(run.path)
            write_json(record, done)
        return done

    def _describe(self, tokens_before: int) -> dict[str, Any]:
        """What the training came to."""
        state = self.trainer.state
        moving = self.seconds["train"] - self.trainer.aside_seconds
        best = None
        if state.best_global_step:
            phase = self.trainer.parts.schedule.phase_at(state.best_global_step - 1).name
            best = {"step": state.best_global_step, "phase": phase, "validation_loss": state.best_metric}
        return {
            "steps": state.global_step,
            "stopped_early": self.callback.stopped_early,
            "tokens_per_second": round((self.trainer.num_tokens - tokens_before) / moving, 1),
            "best_checkpoint": best,
        }

    def _choose(self, done: dict[str, Any], *, select_best: bool) -> None:
        """Put the best checkpoint's adapter in place, or the last one's."""
        best = done["best_checkpoint"]
        wanted = best["step"] if best and select_best else done["steps"]
        self.trainer.load_checkpoint_adapter(wanted)
        if best and select_best:
            self.show(
                f"best checkpoint: step {best['step']}, phase {best['phase']}, validation loss {best['validation_loss']:.4f}"
            )
