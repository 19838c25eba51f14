"""The answers of an experiment's runs, scored again example by example, and what may be said of the arms.

A run keeps scores, not what each example adds to them. Its answers and examples are read again, scored again, and must give
the score that the run has: so the comparison stands on the same numbers as the run's own page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from peftlab.catalog import METRICS
from peftlab.comparison import metrics_of
from peftlab.config import TaskSettings, build_config
from peftlab.errors import EvaluationError, RunError
from peftlab.metric import Score
from peftlab.run import RunFolder
from peftlab.seeded_scores import SeededDifference, SeededScore, compare_all, gather
from peftlab.study.carrying import DoneRun
from peftlab.study.settings import StudySettings
from peftlab.task import Splits
from peftlab.task_data import load_splits

LEAST_SEEDS = 3
"""From so many seeds on a winner may be named."""
_CLOSE = 1e-6
_CLASS_DECODING = "argmax of the class logits"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One metric of all arms.

    Attributes:
        metric: The metric's name.
        unit: Its unit.
        higher_is_better: Its direction.
        values: Arm to the value of each seed.
        scores: Arm to its score over seeds and examples; empty with one seed, or where a metric keeps no rows.
        differences: Every pair of arms; empty where no winner may be named.
        withheld: Why no winner may be named; "" where the data were asked.
    """

    metric: str
    unit: str
    higher_is_better: bool
    values: dict[str, tuple[float, ...]]
    scores: dict[str, SeededScore]
    differences: list[SeededDifference]
    withheld: str

    @property
    def winner(self) -> str | None:
        """The arm that is better than every other; None where the data name none."""
        for arm in self.values:
            beaten = [d for d in self.differences if arm in (d.first, d.second) and d.better == arm]
            if self.differences and len(beaten) == len(self.values) - 1:
                return arm
        return None

    @property
    def sentence(self) -> str:
        """What may be said."""
        if self.withheld:
            return f"{self.metric}: no winner is named: {self.withheld}"
        if self.winner is not None:
            return f"{self.metric}: {self.winner} is better than every other arm"
        told = [
            f"{d.better} is better than {d.second if d.better == d.first else d.first}"
            for d in self.differences
            if d.better
        ]
        return f"{self.metric}: {'; '.join(told) if told else 'not decided'}" + (
            "; the rest is not decided" if told and len(told) < len(self.differences) else ""
        )


def judge(done: Mapping[str, Sequence[DoneRun]], settings: StudySettings) -> list[Verdict]:
    """Score the arms and say what may be said.

    Args:
        done: Arm to its runs, in the order of the seeds.
        settings: What was set.

    Returns:
        One verdict for each metric that all runs have, the task's headline first.

    Raises:
        RunError: The runs were not asked the same, or answers and scores of a run do not belong together.
    """
    runs = [run for found in done.values() for run in found]
    _check_asked([run.run for run in runs])
    names = list(metrics_of(runs[0].run.evaluation(), "after"))
    shared = [
        name for name in names if all(name in metrics_of(run.run.evaluation(), "after") for run in runs)
    ]
    by_run = {run.planned.folder: rescore(run.run) for run in runs}
    found = []
    for name in shared:
        kept = {
            arm: [metrics_of(run.run.evaluation(), "after")[name] for run in own] for arm, own in done.items()
        }
        rows = {arm: [by_run[run.planned.folder].get(name) for run in own] for arm, own in done.items()}
        found.append(_verdict(name, kept, rows, settings))
    return found


def _verdict(
    name: str,
    kept: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Mapping[str, Sequence[Score | None]],
    settings: StudySettings,
) -> Verdict:
    """One metric of all arms."""
    first = next(iter(kept.values()))[0]
    values = {arm: tuple(float(score["value"]) for score in scores) for arm, scores in kept.items()}
    scores: dict[str, SeededScore] = {}
    differences: list[SeededDifference] = []
    num_seeds = len(next(iter(values.values())))
    whole = {arm: [s for s in found if s is not None and s.rows is not None] for arm, found in rows.items()}
    withheld = ""
    if num_seeds < LEAST_SEEDS:
        withheld = f"{num_seeds} seed{'s' * (num_seeds > 1)}, from {LEAST_SEEDS} on one may be"
    elif any(len(found) < num_seeds for found in whole.values()):
        withheld = "the metric keeps no value for each example"
    elif first["count"] < 2:
        withheld = "one example says nothing"
    if num_seeds > 1 and first["count"] > 1 and all(len(found) == num_seeds for found in whole.values()):
        scores = {arm: gather(found, seed=settings.data_seed) for arm, found in whole.items()}
    if scores and not withheld:
        differences = compare_all(scores, seed=settings.data_seed, num_resamples=settings.resamples)
    return Verdict(
        name, first["unit"], bool(first["higher_is_better"]), values, scores, differences, withheld
    )


def rescore(run: RunFolder, when: str = "after") -> dict[str, Score]:
    """The scores of a run's answers, with the rows of each example.

    Args:
        run: A finished run.
        when: "before" or "after" training.

    Returns:
        The scores by metric, equal to those that the run has.

    Raises:
        RunError: Answers and scores of the run do not belong together.
        EvaluationError: The data have changed since.
    """
    config, half = build_config(run.config), run.evaluation()[when]
    rows = run.predictions(half["predictions"])
    splits = _splits(config.task.model_dump_json(), config.data_seed)
    known = {example.id: example for example in splits.test}
    missing = [row["id"] for row in rows if row["id"] not in known]
    if missing:
        raise EvaluationError(
            f"the test split no longer has the example '{missing[0]}': the data have changed since the run"
        )
    examples, answers = [known[row["id"]] for row in rows], [str(row["prediction"]) for row in rows]
    if half["decoding"]["kind"] == _CLASS_DECODING:
        names = {name: str(index) for index, name in enumerate(splits.labels)}
        answers = [names.get(answer, answer) for answer in answers]
    found = {}
    for name, kept in half["metrics"].items():
        if name == "perplexity":  # it is of the model, not of its answers
            continue
        score = METRICS.load(name).score(answers, examples, seed=config.training.seed)
        if not math.isclose(score.value, kept["value"], rel_tol=_CLOSE, abs_tol=_CLOSE):
            raise RunError(
                f"{run.path.name}: its answers score {name} {score.value:.6g}, its evaluation says {kept['value']:.6g}:"
                " the files do not belong together, or the metric is another version's; remove the run and repeat"
            )
        found[name] = score
    return found


@lru_cache(maxsize=4)
def _splits(task: str, seed: int) -> Splits:
    """The splits of a task, read once for all runs."""
    return load_splits(TaskSettings.model_validate_json(task), seed=seed)


def _check_asked(runs: Sequence[RunFolder]) -> None:
    """Refuse runs that answered other examples, or that decoded in another way."""
    first: tuple[Any, Any] | None = None
    for run in runs:
        half = run.evaluation()["after"]
        decoding = {
            k: v for k, v in half["decoding"].items() if k not in ("batch_size", "by_generate", "seed")
        }
        asked = [row["id"] for row in run.predictions(half["predictions"])], decoding
        if first is None:
            first = asked
        for what, one, other in zip(("test examples", "decoding"), first, asked, strict=True):
            if one != other:
                raise RunError(f"{runs[0].name} and {run.name} cannot be compared: the {what} differ")
