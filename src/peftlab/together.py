"""Configs in, finished runs out, trained together: each pass goes once through the base that the runs share.

Every run has its own complete folder, as `execute` makes it of the config alone. Only the training is side by side: before
it each run scores the base, after it each has its adapter put on the base alone and goes through the same stages
(`execution.Execution`). A run that was stopped goes on from its own checkpoint, among others or alone.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from peftlab.config import RunConfig, build_config
from peftlab.devices import choose_device, choose_dtype, num_processes
from peftlab.errors import ConfigError, Interrupted
from peftlab.execution import Execution
from peftlab.files import read_yaml
from peftlab.joint.adapters import AdapterOfRun, JoinedAdapters, check_shareable
from peftlab.joint.agreement import check_agreement
from peftlab.joint.training import JointRun, carry_out_together, tell_failed
from peftlab.loading import meta_model
from peftlab.mapping import map_model
from peftlab.methods.lora import Settings
from peftlab.progress import RunCallback
from peftlab.resolve import Resolved, resolve
from peftlab.run import RunFolder
from peftlab.training import TrainingParts

_NOTE = "trained together with others: hidden states of frozen blocks are not kept, the blocks' passes are shared instead"


def run_together(
    configs: Sequence[RunConfig],
    *,
    names: Sequence[str] | None = None,
    show: Callable[[str], None] = print,
) -> list[RunFolder]:
    """Carry out several runs of LoRA over one base.

    They may differ in all of the method's settings, in rates, seeds, steps, phases and evaluation, and share base, task,
    data and layout of rows. Each ends as it ends alone: within 1e-5 in float32.

    Args:
        configs: What is asked for, two or more.
        names: What a message calls each of them; "config 1" and so on where None.
        show: Receives the lines for the person.

    Returns:
        The finished runs, in the order of their configs.

    Raises:
        InputError: A config cannot be carried out, or not beside the others; nothing heavy has started.
        RunError: A run failed; the others are finished.
        Interrupted: They were stopped by a signal after saving checkpoints.
    """
    called = list(names or (f"config {number}" for number in range(1, len(configs) + 1)))
    if len(called) != len(configs) or len(set(called)) != len(called):
        raise ConfigError(f"{len(configs)} configs need {len(configs)} different names, not {called}")
    resolved = _resolve(dict(zip(called, configs, strict=True)))
    runs = {
        name: RunFolder.create(one.config.output.directory, one.config.run_name())
        for name, one in resolved.items()
    }
    _carry_out(resolved, runs, show)
    return list(runs.values())


def resume_together(folders: Sequence[Path], *, show: Callable[[str], None] = print) -> list[RunFolder]:
    """Go on with runs that were stopped, each from its own last checkpoint, wherever it stands.

    Args:
        folders: Run folders; finished ones stay as they are, and one that is left goes on by itself.
        show: Receives the lines for the person.

    Returns:
        The finished runs.

    Raises:
        InputError: The runs do not fit together.
        RunError: A run failed; the others are finished.
        Interrupted: They were stopped by a signal after saving checkpoints.
    """
    runs = {str(folder): RunFolder(folder) for folder in folders}
    for name, run in runs.items():
        if run.is_finished:
            show(f"already finished: {name}")
    left = {name: run for name, run in runs.items() if not run.is_finished}
    configs = {name: build_config(read_yaml(run.path / RunFolder.CONFIG)) for name, run in left.items()}
    if len(left) == 1:
        _alone(resolve(next(iter(configs.values()))), next(iter(left.values())), show)
    elif left:
        _carry_out(_resolve(configs), left, show)
    return list(runs.values())


def _alone(resolved: Resolved, run: RunFolder, show: Callable[[str], None]) -> None:
    """Go on with one run."""
    try:
        Execution(resolved, run, show).carry_out()
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with peftlab run --resume {run.path}") from None
    except Exception as error:
        _note_failure(run, error)
        raise


def _resolve(configs: Mapping[str, RunConfig]) -> dict[str, Resolved]:
    """Check configs against each other, then each against its data, the model and this machine.

    Raises:
        InputError: Something does not fit.
    """
    if num_processes() > 1:
        raise ConfigError("runs train together in one process; start them without torchrun")
    check_agreement(configs)
    found = {name: resolve(config) for name, config in configs.items()}
    check_agreement({name: one.config for name, one in found.items()})  # the dtype is settled now
    first = next(iter(found.values()))
    model = first.config.model
    base: Any = meta_model(first.source, dtype=choose_dtype(model.weights_dtype, choose_device(model.device)))
    adapters = {name: _adapter(one) for name, one in found.items()}
    check_shareable(base, map_model(base), adapters, head=first.source.head)
    return {name: replace(one, preflight=_with_note(one.preflight)) for name, one in found.items()}


def _with_note(preflight: dict[str, Any]) -> dict[str, Any]:
    """A pre-flight that says that the run has company."""
    return preflight | {"notes": [*preflight["notes"], _NOTE]}


def _adapter(resolved: Resolved) -> AdapterOfRun:
    """What a run's adapter is made of."""
    config = resolved.config
    return AdapterOfRun(Settings(**config.adapters[0].settings), config.training.seed)


def _carry_out(
    resolved: Mapping[str, Resolved], runs: Mapping[str, RunFolder], show: Callable[[str], None]
) -> None:
    """All stages of all runs.

    Raises:
        RunError: A run failed; the others are finished.
        Interrupted: They were stopped.
    """
    executions = {name: Execution(one, runs[name], show) for name, one in resolved.items()}
    try:
        failed = _go_through(executions)
    except KeyboardInterrupt:
        raise _stopped(runs) from None
    except Exception as error:
        for run in runs.values():
            if not run.is_finished:
                _note_failure(run, error)
        raise
    if failed:
        raise tell_failed(failed, [name for name in runs if name not in failed])


def _note_failure(run: RunFolder, error: BaseException) -> None:
    """Log what ended a run, unless it can go on."""
    if not isinstance(error, Interrupted):
        run.append_event("run_failed", error=f"{type(error).__name__}: {error}")


def _stopped(runs: Mapping[str, RunFolder]) -> Interrupted:
    """What is said of stopped runs."""
    left = " ".join(str(run.path) for run in runs.values() if not run.is_finished)
    return Interrupted(f"stopped; go on with peftlab together --resume {left}")


def _go_through(executions: Mapping[str, Execution]) -> dict[str, BaseException]:
    """Load the base once, train side by side, finish one after another.

    Returns:
        The errors of runs that failed; the others are finished.

    Raises:
        Interrupted: A signal stopped them.
    """
    for execution in executions.values():
        execution.begin()
    first = next(iter(executions.values()))
    base = first.load()
    for execution in executions.values():
        execution.seconds["load"] = first.seconds["load"]
        execution.look(base)
    results, tensors, failed = _train(executions, base)
    for name, error in failed.items():
        _note_failure(executions[name].run, error)
    if any(isinstance(error, Interrupted) for error in failed.values()):
        raise _stopped({name: execution.run for name, execution in executions.items()})
    for name, training in results.items():
        attachment = executions[name].attach(base)
        attachment.load(tensors[name])
        executions[name].finish(attachment, training)
        attachment.remove()
    return failed


def _train(
    executions: Mapping[str, Execution], base: Any
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]], dict[str, BaseException]]:
    """Train side by side.

    Returns:
        Of each run that reached its end what its training came to and the chosen adapter's tensors; the others' errors.
    """
    inside = {name: f"run{number}" for number, name in enumerate(executions, 1)}  # peft's names have no dots
    adapters = {inside[name]: _adapter(execution.resolved) for name, execution in executions.items()}
    head = next(iter(executions.values())).resolved.source.head
    joined = JoinedAdapters(base, map_model(base), adapters, head=head)
    try:
        runs: dict[str, JointRun] = {}
        callbacks: list[RunCallback] = []
        for name, execution in executions.items():
            own = inside[name]
            callbacks.append(execution.callback(quiet=bool(callbacks)))  # one bar for all
            with joined.alone(own):
                parts = execution.parts(joined.attachments[own])
            company = [other.run.path.name for other in executions.values() if other is not execution]
            execution.run.append_event("trained_together", others=company)
            runs[own] = _joint_run(execution, parts, callbacks[-1])
        _check_layouts({name: runs[own].parts for name, own in inside.items()})
        with _heard(callbacks):
            ended = carry_out_together(joined, runs)
        results = {name: ended.results[own] for name, own in inside.items() if own in ended.results}
        failed = {name: ended.failed[own] for name, own in inside.items() if own in ended.failed}
        return results, {name: joined.attachments[inside[name]].tensors() for name in results}, failed
    finally:
        joined.remove()


def _joint_run(execution: Execution, parts: TrainingParts, callback: RunCallback) -> JointRun:
    """One run as it trains among others: from its last checkpoint to the record of what it came to."""
    return JointRun(
        parts,
        execution.arguments(),
        (callback,),
        carry_out=lambda trainer: execution.fit(trainer, callback),
    )


def _check_layouts(parts: Mapping[str, TrainingParts]) -> None:
    """Refuse runs whose rows lie in different ways.

    Raises:
        ConfigError: They do.
    """
    ways = {name: _way(own) for name, own in parts.items()}
    if len(set(ways.values())) > 1:
        told = ", ".join(f"{name} {way}" for name, way in ways.items())
        raise ConfigError(
            f"training.layout=auto comes to different layouts ({told}): set training.layout to one of them for all runs"
        )


def _way(parts: TrainingParts) -> str:
    """How a run's rows lie."""
    if parts.isolation is not None:
        return "packed"
    return "padded" if parts.grouping is None else "grouped"


@contextmanager
def _heard(callbacks: Sequence[RunCallback]) -> Iterator[None]:
    """A context in which a signal has every run save and stop; a second one ends the process as usual.

    Args:
        callbacks: The runs' progress; their own ears are of use in a main thread alone.
    """
    before: dict[int, Any] = {}

    def stop(number: int, _: FrameType | None) -> None:
        for callback in callbacks:
            callback.stopped_by = signal.Signals(number).name
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            before[number] = signal.signal(number, stop)
        except ValueError:  # not the main thread: the caller keeps its own handling
            break
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
