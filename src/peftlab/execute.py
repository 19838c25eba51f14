"""Config in, finished run out.

resolve -> run folder -> base -> evaluation before -> adapter -> training -> best checkpoint -> bundle ->
evaluation after -> report -> DONE. A killed run goes on at the last good checkpoint and keeps what was finished.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from peftlab.attaching.towers import attach_adapters
from peftlab.batches import Collator
from peftlab.catalog import PROBES
from peftlab.config import RunConfig, build_config, read_yaml
from peftlab.devices import (
    choose_device,
    describe_environment,
    explain_device,
    num_processes,
    peak_memory,
    process_rank,
)
from peftlab.errors import Interrupted, ModelError, RunError
from peftlab.evaluation import Evaluator
from peftlab.family import FamilyMap
from peftlab.files import write_json
from peftlab.fit import Fit, wait_for_all
from peftlab.gradients import GradientGroups
from peftlab.loading import hash_tensors, hash_tokenizer, load_model
from peftlab.mapping import map_model
from peftlab.mapping.spot_check import spot_check
from peftlab.memory.fitting import NOT_PREDICTED, plan_memory
from peftlab.memory.splitting import describe_split, longest_batch, split_step
from peftlab.method import Attachment
from peftlab.probe import ProbeContext, Recording
from peftlab.progress import RunCallback
from peftlab.proof import fingerprint
from peftlab.resolve import Resolved, resolve
from peftlab.run import RunFolder
from peftlab.step_engine import choose_engine
from peftlab.store import BundleFacts, save_bundle
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts, ignore_event, make_arguments


def plan(config: RunConfig, *, memory: int | None = None) -> dict[str, Any]:
    """What a run would do, without doing it.

    Args:
        config: What is asked for.
        memory: Bytes there are; None looks at the device.

    Returns:
        The pre-flight, as in `preflight.json`, and under "memory" whether the longest batch fits; where that cannot be
        predicted, the verdict "not predicted" and the reason.

    Raises:
        InputError: Something does not match, or the batch size is to be chosen by a prediction that cannot be made.
    """
    resolved = resolve(config)
    if config.training.auto_batch_size:
        resolved = _split(resolved, memory=memory, confirm=False)
    longest = longest_batch(resolved.train_rows, resolved.config.training.batch_size)
    try:
        planned = plan_memory(resolved.config, source=resolved.source, shape=longest, memory=memory).as_dict()
    except ModelError as error:  # such a run can be trained; only nothing can be said of its memory
        planned = {"verdict": NOT_PREDICTED, "reason": str(error)}
    return resolved.preflight | {"memory": planned}


def execute(
    config: RunConfig,
    resume: Path | None = None,
    *,
    show: Callable[[str], None] = print,
) -> RunFolder:
    """Carry out a run.

    Args:
        config: What is asked for; a resumed run has its own.
        resume: The folder of a run to go on with.
        show: Receives the lines for the person.

    Returns:
        The finished run.

    Raises:
        InputError: Something does not fit; nothing heavy has started.
        RunError: The run failed.
        Interrupted: It was stopped by a signal after saving a checkpoint.
    """
    if resume is not None:
        if RunFolder(resume).is_finished:
            show(f"already finished: {resume}")
            return RunFolder(resume)
        config = build_config(read_yaml(resume / "config.yaml"))
    resolved = resolve(config)
    if config.training.auto_batch_size and resume is None:  # what is resumed goes on as it was split
        resolved = _split(resolved)
    first = process_rank() == 0
    run = _open_folder(resolved.config, resume)
    try:
        _Execution(resolved, run, show if first else _silent).carry_out()
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with peftlab run --resume {run.path}") from None
    except Exception as error:
        if first and not isinstance(error, Interrupted):
            run.append_event("run_failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return run


def _split(resolved: Resolved, *, memory: int | None = None, confirm: bool = True) -> Resolved:
    """The run with its steps split into batches that fit."""
    longest = longest_batch(resolved.train_rows, resolved.config.training.batch_size)
    config, choice = split_step(
        resolved.config, source=resolved.source, shape=longest, memory=memory, confirm=confirm
    )
    notes = [*resolved.preflight["notes"], describe_split(choice)]
    return replace(resolved, config=config, preflight=resolved.preflight | {"notes": notes})


def _silent(_: str) -> None:
    """Shows nothing: what processes other than the first say."""


def _open_folder(config: RunConfig, resume: Path | None) -> RunFolder:
    """The run folder, made by the first process and told to the others."""
    path: list[str | None] = [None]
    if process_rank() == 0:
        run = (
            RunFolder(resume)
            if resume is not None
            else RunFolder.create(config.output.directory, config.run_name())
        )
        path = [str(run.path)]
    if num_processes() > 1:
        device = choose_device(config.model.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not distributed.is_initialized():  # the others wait while the first process evaluates
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(hours=12))
        distributed.broadcast_object_list(path)
    return RunFolder(Path(str(path[0])))


@dataclass(slots=True)
class _Execution:
    """One run on its way.

    Attributes:
        resolved: The run, checked.
        run: Its folder.
        show: Receives the lines for the person.
        seconds: Time of each part so far.
    """

    resolved: Resolved
    run: RunFolder
    show: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

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
        began = time.perf_counter()
        first = process_rank() == 0
        if first:
            self._write_beginning()
        base = self._timed(
            "load",
            lambda: load_model(self.resolved.source, self.config.model, seed=self.config.training.seed),
        )
        marks = [(name, p, fingerprint(p)) for name, p in base.named_parameters()]
        before = self._evaluate(base, "before") if first else None
        wait_for_all()
        family = map_model(base)
        self._look_once_more(base, family)
        attachment = attach_adapters(
            base,
            family,
            self.config.adapters,
            head=self.resolved.source.head,
            seed=self.config.training.seed,
        )
        training = self._train(attachment)
        if not first:
            wait_for_all()
            return
        self._check_base(marks, attachment)
        after = self._evaluate(attachment.model, "after")
        self._save(attachment, after)
        self.seconds["total"] = time.perf_counter() - began
        self._write_summary(attachment, training, {"before": before, "after": after})
        self._tell()
        wait_for_all()

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
        resolved, config = self.resolved, self.config
        groups = GradientGroups(attachment.family, attachment.parameters())
        probes = {}
        for name, settings in config.probes.items():
            leaf = PROBES.load(name)
            probes[name] = leaf.start(ProbeContext(groups), leaf.Settings(**settings))
        if isinstance(attachment, Recording):
            probes |= attachment.probes()
        first = process_rank() == 0
        callback = RunCallback(patience=config.training.early_stopping_patience, quiet=not first)
        pad_id, head = resolved.source.tokenizer.pad_token_id, resolved.source.head
        engine = choose_engine(attachment, resolved.train_rows, config.training, head=head, pad_id=pad_id)
        if first:
            self.run.append_event("steps_prepared", **engine.found)
        parts = TrainingParts(
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
            isolation=engine.isolation,
            trunk_bytes=int(config.training.trunk_cache_gigabytes * 10**9),
        )
        trainer = LabTrainer(
            parts, make_arguments(config, self.run.checkpoints, resolved.schedule), [callback]
        )
        callback.watch(trainer)
        return Fit(self.run, trainer, callback, self.show, self.seconds).carry_out(
            select_best=config.training.select_best
        )

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
