"""Carry out an experiment that names its arms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftlab.study.carrying import Carried, carry_out_runs
from peftlab.study.planning import Study
from peftlab.study.scoring import judge
from peftlab.study.settings import StudySettings
from peftlab.study.telling import Findings, Table, gather_notes, write_findings

RUNS_FOLDER = "runs"


def conduct(study: Study, settings: StudySettings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Carry out the runs, score them and say what may be said.

    Args:
        study: The experiment.
        settings: What was set.
        folder: Where tables and page go.
        show: Is given each text for a person.

    Returns:
        The files that were written.

    Raises:
        ConfigError: The arms would not be compared fairly.
        RunError: A run failed, or its files do not belong together; the finished ones stay.
        EvaluationError: A score cannot be computed.
    """
    directory = (settings.runs or folder.parent / RUNS_FOLDER).expanduser().absolute()
    show(study.QUESTION)
    carried = carry_out_runs(study.arms(settings), settings, directory, folder / "configs", show)
    findings = Findings(
        study.QUESTION,
        carried,
        judge(carried.done, settings),
        _own_tables(study, carried),
        [*_own_notes(study, settings), *gather_notes(carried, settings)],
    )
    title = f"experiment {study.__name__.rpartition('.')[2]}"  # type: ignore[attr-defined]
    return write_findings(findings, folder, title, show)


def _own_notes(study: Any, settings: StudySettings) -> list[str]:
    """What an experiment says beside that."""
    own = getattr(study, "notes", None)
    return list(own(settings)) if own is not None else []


def _own_tables(study: Any, carried: Carried) -> list[Table]:
    """What an experiment reports beside the scores."""
    own = getattr(study, "tables", None)
    return list(own(carried)) if own is not None else []
