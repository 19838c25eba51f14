"""Train or go on: the part of a run between the adapter's start and the choice of its best checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from peftlab.checkpoint import has_ended_at, last_good_checkpoint, list_checkpoints, read_state
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
        checkpoint = self._find_checkpoint()
        total = self.trainer.parts.schedule.total_steps
        if checkpoint is not None and has_ended_at(checkpoint, total_steps=total):
            self.trainer.restore_logs(checkpoint)
            done = self._describe_ended(checkpoint)
        else:
            done = self._train(checkpoint)
        self._choose(done, select_best=select_best)
        if first:
            for probe in self.trainer.parts.probes.values():
                probe.write(run.path)
            write_json(record, done)
        return done

    def _find_checkpoint(self) -> Path | None:
        """The last good checkpoint; damaged ones are put aside, and the event log is cut to where training goes on."""
        run, first = self.run, process_rank() == 0
        checkpoint, problems = last_good_checkpoint(run.checkpoints)
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        wait_for_all()
        if first:
            for problem in problems:
                self.show(f"a checkpoint was left out: {problem}")
            for later, path in list_checkpoints(run.checkpoints):
                if later > step:
                    path.rename(path.with_name(f"damaged-{path.name}"))
            run.drop_events_after(step)
        if checkpoint is not None and first:
            run.append_event("resumed", step=step)
            self.show(f"going on after step {step}")
        wait_for_all()
        return checkpoint

    def _train(self, checkpoint: Path | None) -> dict[str, Any]:
        """Train from a checkpoint, or from the start."""
        began = time.perf_counter()
        try:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.callback.close()
        self.seconds["train"] = time.perf_counter() - began
        state = self.trainer.state
        if self.callback.stopped_by is not None and state.global_step < state.max_steps:
            raise Interrupted(
                f"{self.callback.stopped_by}: stopped after step {state.global_step}, saved; go on with"
                f" peftlab run --resume {self.run.path}"
            )
        moving = self.seconds["train"] - self.trainer.aside_seconds
        rate = (self.trainer.num_tokens - self.callback.tokens_before) / moving
        return self._describe(state.global_step, state.best_global_step, state.best_metric, rate)

    def _describe_ended(self, checkpoint: Path) -> dict[str, Any]:
        """What a training came to that had ended before it was recorded."""
        saved = read_state(checkpoint)
        self.trainer.stopped_early = bool(saved["stopped_early"])
        steps = [event for event in self.run.timeline() if event["event"] == "step"]
        rate = steps[-1]["tokens_per_second"] if steps else None
        return self._describe(saved["step"], saved["best_step"], saved["best_loss"], rate)

    def _describe(
        self, steps: int, best_step: int | None, best_loss: float | None, rate: float | None
    ) -> dict[str, Any]:
        """What the training came to."""
        best = None
        if best_step:
            phase = self.trainer.parts.schedule.phase_at(best_step - 1).name
            best = {"step": best_step, "phase": phase, "validation_loss": best_loss}
        return {
            "steps": steps,
            "stopped_early": self.trainer.stopped_early,
            "tokens_per_second": None if rate is None else round(rate, 1),
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
