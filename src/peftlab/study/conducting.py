"""Carry out an experiment that names its arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftlab.study.carrying import Carried, carry_out_runs
from peftlab.study.planning import Arms, Study
from peftlab.study.scoring import judge
from peftlab.study.settings import StudySettings
from peftlab.study.telling import Findings, Table, gather_notes, write_findings

RUNS_FOLDER = "runs"


def conduct(study: Study, settings: StudySettings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Carry out a leaf of `experiments/` that names its arms.

    Args:
        study: The leaf.
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
    leaf: Any = study  # what a module may have beside the protocol
    own_notes = leaf.notes(settings) if hasattr(leaf, "notes") else []
    tables = leaf.tables if hasattr(leaf, "tables") else None
    return compare_arms(
        study.QUESTION, study.arms(settings), settings, folder, show, tables=tables, notes=own_notes
    )


def compare_arms(
    question: str,
    arms: Arms,
    settings: StudySettings,
    folder: Path,
    show: Callable[[str], object],
    *,
    tables: Callable[[Carried], list[Table]] | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Carry out the runs, score them and say what may be said.

    Args:
        question: What is asked.
        arms: What is compared.
        settings: What was set.
        folder: Where tables and page go.
        show: Is given each text for a person.
        tables: More tables, from the runs.
        notes: What a reader must know beside that.

    Returns:
        The files that were written.

    Raises:
        ConfigError: The arms would not be compared fairly.
        RunError: A run failed, or its files do not belong together; the finished ones stay.
        EvaluationError: A score cannot be computed.
    """
    show(question)
    carried = carry_out_runs(arms, settings, runs_folder(settings, folder), folder / "configs", show)
    found = Findings(
        question,
        carried,
        judge(carried.done, settings),
        tables(carried) if tables is not None else [],
        [*notes, *gather_notes(carried, settings)],
    )
    return write_findings(found, folder, show)


def runs_folder(settings: StudySettings, folder: Path) -> Path:
    """Where an experiment's runs lie.

    Args:
        settings: What was set.
        folder: The experiment's own folder.

    Returns:
        What the settings name, else one folder for all experiments beside this one.
    """
    return (settings.runs or folder.parent / RUNS_FOLDER).expanduser().absolute()
