"""The trials of a sweep: points of a space, each a run with the lowest validation loss as its value."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import ConfigError, InputError
from peftlab.run import RunFolder
from peftlab.run_series import carry_out_run
from peftlab.study.planning import PlannedRun, make_config
from peftlab.study.settings import StudySettings
from peftlab.study.space import Axis

Point = dict[str, Any]
_OWNER = "owner"
INSTALL = "pip install 'peftlab[sweep]'"


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of a sweep.

    Attributes:
        point: Config key to value.
        value: The lowest validation loss, the mean over seeds; None where it was given up or is no run.
        results: What each seed came to, as of `run_series.read_run`.
        note: Why it has no value; "" where it has.
    """

    point: Point
    value: float | None
    results: Sequence[Mapping[str, Any]]
    note: str = ""


class Trials:
    """Carries out points as runs, each seed after the other.

    Args:
        settings: What all runs share.
        directory: The folder of the runs.
        configs: Where config files for processes go.
        show: Is given a line for each trial.
    """

    def __init__(
        self, settings: StudySettings, directory: Path, configs: Path, show: Callable[[str], object]
    ) -> None:
        self.settings, self.directory, self.configs, self.show = settings, directory, configs, show
        self.done: list[Trial] = []

    def plan(self, point: Point) -> list[PlannedRun]:
        """The runs of a point, without test answers: a sweep never looks at them.

        Args:
            point: Config key to value.

        Raises:
            ConfigError: The values do not go together.
        """
        made = [
            (seed, make_config("sweep", point, self.settings, self.directory, seed=seed, scored=False))
            for seed in self.settings.seeds
        ]
        return [PlannedRun("sweep", seed, config) for seed, config in made]

    def carry_out(self, point: Point, *, give_up: Callable[[RunFolder], bool] | None = None) -> Trial:
        """Carry out a point; what is finished is read.

        Args:
            point: Config key to value.
            give_up: Is asked during the first seed's run whether to end it.

        Returns:
            The trial, which `done` has too.

        Raises:
            RunError: A run failed.
        """
        try:
            planned = self.plan(point)
        except ConfigError as error:
            return self.note(Trial(point, None, [], f"not valid: {' '.join(str(error).split())}"))
        results: list[Mapping[str, Any]] = []
        for place, run in enumerate(planned):
            found = carry_out_run(run.config, self.configs, give_up=give_up if place == 0 else None)
            if not found:
                return self.note(Trial(point, None, results, "given up: worse than the others by then"))
            results.append(found)
        losses = [result["validation_loss"] for result in results]
        if any(loss is None for loss in losses):
            return self.note(Trial(point, None, results, "no validation loss: it diverged or had no rows"))
        return self.note(Trial(point, statistics.fmean(losses), results))

    def note(self, trial: Trial) -> Trial:
        """Keep and tell a trial.

        Args:
            trial: The trial.

        Returns:
            The same.
        """
        self.done.append(trial)
        value = trial.note if trial.value is None else f"validation loss {trial.value:.4f}"
        self.show(f"{len(self.done)}: {show_point(trial.point)}: {value}")
        return trial


def show_point(point: Mapping[str, Any]) -> str:
    """A point as one line.

    Args:
        point: Config key to value.
    """
    return ", ".join(f"{key}={value}" for key, value in point.items())


def ask_optuna(
    trials: Trials, axes: list[Axis], *, count: int, seed: int, storage: str | Path, name: str, prune: bool
) -> None:
    """Have Optuna's TPE suggest points; several processes or machines may share one storage.

    Args:
        trials: What carries them out.
        axes: The space.
        count: How many trials the storage shall hold in the end.
        seed: Seeds the suggestions.
        storage: A file, or a URL of Optuna's such as postgresql://...
        name: The study's name in the storage.
        prune: Whether a run that is worse than the median of the others at the same validation is ended.

    Raises:
        InputError: Optuna is not installed.
        RunError: A run failed.

    Source: Akiba et al. 2019; Bergstra et al. 2011 for TPE.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(f"sampler=tpe needs Optuna: {INSTALL}; random and grid do without") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=_open_storage(storage),
        study_name=name,
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4) if prune else optuna.pruners.NopPruner(),
    )
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # who goes on draws on
    _take_over(study, trials, axes)
    failed = 0
    while _num_done(study) < count and failed < count:
        asked = study.ask()
        asked.set_user_attr(_OWNER, [platform.node(), os.getpid()])
        point = {axis.key: _suggest(asked, axis) for axis in axes}
        done = trials.carry_out(point, give_up=_Pruning(asked) if prune else None)
        if done.value is not None:
            study.tell(asked, done.value)
        elif done.note.startswith("given up"):
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            failed += 1


def _take_over(study: Any, trials: Trials, axes: list[Axis]) -> None:
    """Note what the storage holds, and ask again what a process that is gone has left."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get(_OWNER, ["", 0])
        if host == platform.node() and not _lives(process):
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=TrialState.FAIL)
    for trial in study.get_trials(states=(TrialState.COMPLETE,)):
        point = _ordered(trial.params, axes)
        if all(RunFolder(run.folder).is_finished for run in trials.plan(point)):
            trials.carry_out(point)
        else:  # on another machine
            trials.note(Trial(point, trial.value, []))


def _lives(process: int) -> bool:
    """Whether a process of this machine is still there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _num_done(study: Any) -> int:
    """Trials that need no more work."""
    from optuna.trial import TrialState

    return len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))


class _Pruning:
    """Tells Optuna a run's validation losses as they come, and asks whether to go on."""

    def __init__(self, trial: Any) -> None:
        self._trial, self._last = trial, 0

    def __call__(self, run: RunFolder) -> bool:
        """Whether the run shall be ended."""
        for event in run.timeline():
            if event["event"] == "validated" and event["step"] > self._last:
                self._last = int(event["step"])
                self._trial.report(float(event["validation_loss"]), self._last)
        return self._last > 0 and bool(self._trial.should_prune())


def _suggest(trial: Any, axis: Axis) -> Any:
    """What Optuna suggests for an axis."""
    if axis.values is not None:
        return axis.values[trial.suggest_categorical(axis.key, list(range(len(axis.values))))]
    if axis.whole:
        return trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
    return float(f"{trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log):.4g}")


def _open_storage(storage: str | Path) -> Any:
    """A storage of Optuna's: a URL as it is, a file as a journal, which works on shared disks too."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in str(storage):
        return str(storage)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(storage)))


def _ordered(params: Mapping[str, Any], axes: Sequence[Axis]) -> Point:
    """A stored trial's point, in the order of the axes."""
    found = {}
    for axis in axes:
        value = params[axis.key]
        if axis.values is not None:
            value = axis.values[value]
        elif not axis.whole:
            value = float(f"{value:.4g}")
        found[axis.key] = value
    return found
