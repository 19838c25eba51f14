"""The stages of a run: from its first file over base, evaluation, adapter and training to its report and DONE."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.attaching.towers import attach_adapters
from peftlab.batches import Collator
from peftlab.catalog import PROBES
from peftlab.config import RunConfig
from peftlab.devices import describe_environment, explain_device, peak_memory, process_rank
from peftlab.errors import RunError
from peftlab.evaluation import Evaluator
from peftlab.family import FamilyMap
from peftlab.files import write_json
from peftlab.fit import Fit, wait_for_all
from peftlab.gradients import GradientGroups
from peftlab.loading import hash_tensors, hash_tokenizer, load_model
from peftlab.mapping import map_model
from peftlab.mapping.spot_check import spot_check
from peftlab.method import Attachment
from peftlab.probe import ProbeContext, Recording
from peftlab.progress import RunCallback
from peftlab.proof import fingerprint
from peftlab.resolve import Resolved
from peftlab.run import RunFolder
from peftlab.step_engine import choose_engine
from peftlab.store import BundleFacts, save_bundle
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts, ignore_event, make_arguments


@dataclass(slots=True)
class Execution:
    """One run on its way.

    `carry_out` goes through the stages; runs that train together go through them side by side (`together`).

    Attributes:
        resolved: The run, checked.
        run: Its folder.
        show: Receives the lines for the person.
        seconds: Time of each part so far.
        marks: Name, tensor and fingerprint of the base's tensors before training.
        before: The scores of the base.
    """

    resolved: Resolved
    run: RunFolder
    show: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    marks: list[tuple[str, nn.Parameter, int]] = field(default_factory=list)
    before: dict[str, Any] | None = None
    _began: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> RunConfig:
        """What was asked for."""
        return self.resolved.config

    @property
    def evaluation_file(self) -> Path:
        """`{task}_evaluation.json`."""
        return self.run.path / f"{self.config.task.name.rpartition('.')[2]}_evaluation.json"

    def carry_out(self) -> None:
        """Everything from the first file to DONE."""
        self.begin()
        base = self.load()
        self.look(base)
        attachment = self.attach(base)
        training = self._train(attachment)
        if process_rank() != 0:
            wait_for_all()
            return
        self.finish(attachment, training)
        wait_for_all()

    def begin(self) -> None:
        """Write the files that say what was asked for and where it runs."""
        if process_rank() == 0:
            self._write_beginning()

    def load(self) -> Any:
        """The base."""
        seed = self.config.training.seed
        return self._timed("load", lambda: load_model(self.resolved.source, self.config.model, seed=seed))

    def look(self, base: Any) -> None:
        """Mark and score the base, and check its map on the real weights.

        Args:
            base: From `load`.
        """
        self.marks = [(name, p, fingerprint(p)) for name, p in base.named_parameters()]
        self.before = self._evaluate(base, "before") if process_rank() == 0 else None
        wait_for_all()
        self._look_once_more(base, map_model(base))

    def attach(self, base: Any) -> Attachment:
        """Put the run's adapters on the base.

        Args:
            base: From `load`.
        """
        return attach_adapters(
            base,
            map_model(base),
            self.config.adapters,
            head=self.resolved.source.head,
            seed=self.config.training.seed,
        )

    def finish(self, attachment: Attachment, training: dict[str, Any]) -> None:
        """Everything from the chosen adapter to DONE.

        Args:
            attachment: The run's adapters, the chosen checkpoint's tensors in place.
            training: What the training came to, from `fit`.

        Raises:
            RunError: Training has changed the base.
        """
        self._check_base(self.marks, attachment)
        after = self._evaluate(attachment.model, "after")
        self._save(attachment, after)
        self.seconds["total"] = time.perf_counter() - self._began
        self._write_summary(attachment, training, {"before": self.before, "after": after})
        self._tell()

    def _write_beginning(self) -> None:
        """The files that say what was asked for and where it runs."""
        config, run = self.config, self.run
        if not run.has("config.yaml"):  # a resumed run keeps what it began with
            write_json(run.path / "environment.json", describe_environment(Path.cwd()))
            write_json(run.path / "preflight.json", self.resolved.preflight)
            device = explain_device(config.model.device)
            dtype = self.resolved.preflight["dtype"]
            run.append_event(
                "run_started",
                name=run.path.name,
                fingerprint=config.fingerprint(),
                device=f"{device.device}: {device.reason}",
                dtype=f"{dtype['name']}: {dtype['reason']}",
            )
            config.save(run.path / "config.yaml")
        from peftlab.tables import render_preflight

        self.show(f"run folder: {run.path}")
        self.show(render_preflight(self.resolved.preflight))

    def _look_once_more(self, base: Any, family: FamilyMap) -> None:
        """Check on the real weights, with a row of the run, what was proved on a twin."""
        collator = Collator(self.resolved.source.tokenizer.pad_token_id, self.resolved.source.head)
        found = spot_check(base, family, collator(self.resolved.train_rows[:1]))
        if process_rank() == 0:
            self.run.append_event("map_checked", found=found)

    def _timed(self, part: str, action: Callable[[], Any]) -> Any:
        """Do something and note how long it took."""
        began = time.perf_counter()
        result = action()
        self.seconds[part] = time.perf_counter() - began
        return result

    def _evaluate(self, model: Any, when: str) -> dict[str, Any] | None:
        """Score a model and keep answers and scores; what a resumed run has already is read, not done again."""
        settings = self.config.evaluation
        if not settings.enabled or (when == "before" and not settings.before):
            return None
        kept = (
            json.loads(self.evaluation_file.read_text(encoding="utf-8"))
            if self.evaluation_file.exists()
            else {}
        )
        if kept.get(when) is not None:
            done: dict[str, Any] = kept[when]
            return done
        evaluator = Evaluator(
            self.resolved.task,
            self.resolved.test_examples,
            self.resolved.source.tokenizer,
            head=self.resolved.source.head,
            max_length=self.config.task.max_length,
            max_new_tokens=settings.answer_tokens(self.resolved.task),
            batch_size=settings.batch_size,
            decoding=settings,
            seed=self.config.training.seed,
            labels=self.resolved.splits.labels,
        )
        file = f"predictions.{when}.jsonl"
        log = self.run.path / f"{file}.partial"
        evaluation = self._timed(f"evaluate_{when}", lambda: evaluator.run(model, log=log))
        evaluator.write_predictions(evaluation, self.run.path / file)
        half = evaluator.describe(evaluation, file)
        whole = {
            "task": self.config.task.name,
            "split": "test",
            "num_examples": len(self.resolved.test_examples),
        }
        write_json(self.evaluation_file, whole | {"before": None, "after": None} | kept | {when: half})
        self.show(f"{when} training: {evaluator.tell(evaluation)}")
        return half

    def _train(self, attachment: Attachment) -> dict[str, Any]:
        """Train, or read what a finished training left; the chosen adapter is in place afterwards."""
        callback = self.callback(quiet=process_rank() != 0)
        trainer = LabTrainer(self.parts(attachment), self.arguments(), [callback])
        return self.fit(trainer, callback)

    def callback(self, *, quiet: bool) -> RunCallback:
        """The run's progress.

        Args:
            quiet: Whether nothing is drawn.
        """
        return RunCallback(patience=self.config.training.early_stopping_patience, quiet=quiet)

    def arguments(self) -> Any:
        """The arguments of the run's trainer."""
        return make_arguments(self.config, self.run.checkpoints, self.resolved.schedule)

    def parts(self, attachment: Attachment) -> TrainingParts:
        """What the run's trainer is made of.

        Args:
            attachment: The run's adapters on the base.
        """
        resolved, config = self.resolved, self.config
        groups = GradientGroups(attachment.family, attachment.parameters())
        probes = {}
        for name, settings in config.probes.items():
            leaf = PROBES.load(name)
            probes[name] = leaf.start(ProbeContext(groups), leaf.Settings(**settings))
        if isinstance(attachment, Recording):
            probes |= attachment.probes()
        first = process_rank() == 0
        pad_id, head = resolved.source.tokenizer.pad_token_id, resolved.source.head
        engine = choose_engine(attachment, resolved.train_rows, config.training, head=head, pad_id=pad_id)
        if first:
            self.run.append_event("steps_prepared", **engine.found)
        return TrainingParts(
            attachment=attachment,
            schedule=resolved.schedule,
            objective=engine.objective,
            collator=Collator(pad_id, head),
            train_rows=resolved.train_rows,
            validation_rows=resolved.validation_rows,
            probes=probes,
            event=self.run.append_event if first else ignore_event,
            keep_checkpoints=config.training.keep_checkpoints,
            seed=config.training.seed,
            **engine.layout(),
            trunk_bytes=int(config.training.trunk_cache_gigabytes * 10**9),
        )

    def fit(self, trainer: LabTrainer, callback: RunCallback) -> dict[str, Any]:
        """Train, or read what a finished training left; the chosen adapter is in place afterwards.

        Args:
            trainer: Of this run.
            callback: Its progress, one of the trainer's callbacks.

        Returns:
            What the training came to.

        Raises:
            Interrupted: A signal stopped it; a checkpoint was saved.
        """
        callback.watch(trainer)
        done = Fit(self.run, trainer, callback, self.show, self.seconds)
        return done.carry_out(select_best=self.config.training.select_best)

    def _check_base(self, marks: list[tuple[str, nn.Parameter, int]], attachment: Attachment) -> None:
        """Refuse to go on with a base that training has changed (law 2)."""
        changed = [n for n, p, mark in marks if fingerprint(p) != mark and n not in attachment.rewritten]
        if changed:
            raise RunError(f"training changed {len(changed)} tensors of the base: {', '.join(changed[:5])}")

    def _save(self, attachment: Attachment, after: dict[str, Any] | None) -> None:
        """Write the bundle."""
        source, config = self.resolved.source, self.config
        scores = {name: score["value"] for name, score in after["metrics"].items()} if after else {}
        facts = BundleFacts(
            adapter=config.adapters[0],
            beside=config.adapters[1:],
            base=config.model.name,
            base_hash=hash_tensors(source),
            tokenizer_hash=hash_tokenizer(source.tokenizer),
            prompt=self.resolved.task.PROMPT,
            task=config.task.name,
            head=source.head,
            labels=self.resolved.splits.labels,
            seed=config.training.seed,
            versions=self.run.environment["versions"],
            scores=scores,
        )
        save_bundle(attachment, source.tokenizer, facts, self.run.path / "final_model")

    def _write_summary(
        self, attachment: Attachment, training: dict[str, Any], halves: dict[str, Any]
    ) -> None:
        """Write `results_summary.json`."""
        proved = {event["phase"] for event in self.run.timeline() if event["event"] == "phase_proved"}
        scores = {
            when: None if half is None else {name: score["value"] for name, score in half["metrics"].items()}
            for when, half in halves.items()
        }
        parameters = attachment.parameters().values()
        summary = {
            "name": self.run.path.name,
            "status": "finished",
            "task": self.config.task.name,
            "method": self.config.adapters[0].method,
            "model": self.config.model.name,
            "scores": scores,
            "counts": {
                "total_parameters": self.resolved.preflight["parameters"]["total"],
                "trainable_parameters": sum(p.numel() for p in parameters),
                "trainable_tensors": len(parameters),
            },
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory_bytes": peak_memory(),
            "tokens_per_second": training["tokens_per_second"],
            "steps": training["steps"],
            "stopped_early": training["stopped_early"],
            "phases": [
                phase | {"proved": phase["name"] in proved} for phase in self.resolved.preflight["phases"]
            ],
            "best_checkpoint": training["best_checkpoint"],
            "base_unchanged": not attachment.rewritten,
        }
        write_json(self.run.path / "results_summary.json", summary)

    def _tell(self) -> None:
        """Plots and report, then DONE."""
        from peftlab.report import write_report

        self.run.append_event("run_finished")
        page = write_report(self.run.path)
        (self.run.path / "DONE").touch()
        self.show(f"report: {page}")
