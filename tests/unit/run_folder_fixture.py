"""A fabricated run folder: plausible numbers, every file of the contract, no torch."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftlab.gradient_log import GradientNormLog
from peftlab.run import RunFolder

PHASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("both", ("attention", "mlp")),
    ("mlp", ("mlp",)),
    ("attention", ("attention",)),
)


def fabricate_phases(
    steps: int, phases: Sequence[tuple[str, tuple[str, ...]]] = PHASES
) -> list[dict[str, Any]]:
    """Phases of equal length over the run."""
    edges = [round(i * steps / len(phases)) for i in range(len(phases) + 1)]
    return [
        {
            "name": name,
            "start_step": edges[i],
            "end_step": edges[i + 1],
            "groups": list(groups),
            "layers": None,
            "trainable_tensors": 24 * len(groups),
            "trainable_parameters": 98_304 * len(groups),
        }
        for i, (name, groups) in enumerate(phases)
    ]


def fabricate_log(
    *,
    steps: int = 420,
    layers: int = 4,
    phases: Sequence[tuple[str, tuple[str, ...]]] = PHASES,
    stacks: Sequence[str] = ("",),
    groups: Sequence[str] = ("attention", "mlp"),
    seed: int = 0,
) -> GradientNormLog:
    """Gradient norms that fall with the step, blank where a phase freezes a group."""
    random.seed(seed)
    log = GradientNormLog()
    placed = fabricate_phases(steps, phases)
    for step in range(1, steps + 1):
        phase = next(p for p in placed if p["start_step"] < step <= p["end_step"])
        data: dict[str, float | None] = {}
        for stack in stacks:
            for layer in range(layers):
                for group, level in (("attention", 0.6), ("mlp", 1.1)):
                    shape = math.exp(-layer / max(4, layers)) * (0.25 + 1.4 * math.exp(-step / (steps / 3)))
                    value = level * shape * math.exp(random.gauss(0, 0.25))
                    active = group in phase["groups"] and group in groups
                    data[f"{stack + '_' if stack else ''}layer_{layer}_{group}"] = value if active else None
        log.append(step, norms_of(data) | {"phase": phase["name"]})
    return log


def norms_of(layer_data: Mapping[str, float | None]) -> dict[str, Any]:
    """One row as `measure_gradient_norms` gives it, from its layers."""
    found = {
        group: [v for name, v in layer_data.items() if name.endswith(group) and v is not None]
        for group in ("attention", "mlp")
    }
    sums = {
        group: math.sqrt(sum(v * v for v in values)) if values else None for group, values in found.items()
    }
    everything = [v for values in found.values() for v in values]
    return {
        **{f"{group}_norm": value for group, value in sums.items()},
        **dict.fromkeys(("embed_norm", "lm_head_norm", "other_norm")),
        "total_norm": math.sqrt(sum(v * v for v in everything)) if everything else None,
        "layer_data": dict(layer_data),
        "num_parameters": {group: 49_152 * len(values) for group, values in found.items()},
    }


def score(metric: str, value: float, width: float, unit: str = "0-100") -> dict[str, Any]:
    """One score as JSON."""
    return {
        "metric": metric,
        "value": value,
        "unit": unit,
        "higher_is_better": True,
        "count": 120,
        "interval": [value - width, value + width],
        "signature": "nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0" if metric == "bleu" else "",
    }


def fabricate_run(
    directory: Path,
    name: str = "embedded-lora-both-mlp-attn-1a2b3c4d",
    *,
    steps: int = 420,
    layers: int = 4,
    phases: Sequence[tuple[str, tuple[str, ...]]] = PHASES,
    stacks: Sequence[str] = ("",),
    until: str = "finished",
    seed: int = 0,
    bleu: float = 61.3,
    rank: int = 8,
) -> RunFolder:
    """Write a run folder.

    Args:
        directory: Where.
        name: The run's name.
        steps: Optimizer steps.
        layers: Layers of each stack.
        phases: Name and groups of each phase.
        stacks: Names of the stacks; "" for the only one.
        until: "started" (config, environment, pre-flight, before), "training" (half of the events) or "finished".
        seed: Of the noise.
        bleu: BLEU after training.
        rank: The adapter's rank.

    Returns:
        The run.
    """
    run = RunFolder.create(directory, name)
    placed = fabricate_phases(steps, phases)
    _write_beginning(run, placed, steps, rank)
    _write_evaluation(run, bleu if until == "finished" else None)
    if until == "started":
        return run
    last = steps if until == "finished" else steps // 2
    best = _write_events(run, placed, steps, last, seed)
    if until != "finished":
        return run
    fabricate_log(steps=steps, layers=layers, phases=phases, stacks=stacks, seed=seed).write(run.path)
    _write_summary(run, placed, steps, best)
    run.append_event("run_finished")
    (run.path / RunFolder.DONE).touch()
    return run


def _write_beginning(run: RunFolder, placed: list[dict[str, Any]], steps: int, rank: int) -> None:
    config = {
        "model": {"name": "peftlab/tiny-base", "dtype": "auto", "device": "auto"},
        "task": {"name": "embedded", "data_dir": None, "max_length": 128},
        "adapters": [
            {"scope": "model", "method": "lora", "settings": {"rank": rank, "alpha": 16.0, "targets": "both"}}
        ],
        "schedule": {"strategy": "both->mlp->attn", "phases": None},
        "training": {"max_steps": steps, "batch_size": 16, "learning_rate": 0.002, "seed": 42},
        "probes": {"gradient_norms": {"frequency": 1, "layers": True}},
        "output": {"directory": "runs", "name": run.name},
    }
    (run.path / RunFolder.CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    environment = {
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.1"},
        "hardware": {
            "platform": "Linux-6.1",
            "processor": "AMD EPYC",
            "cores": 2,
            "threads": 2,
            "devices": [],
        },
        "git": {"commit": "0f1e2d3c4b5a69788796a5b4c3d2e1f001122334", "dirty": True},
        "command": ["peftlab", "run", "--set", "training.seed=42"],
    }
    _json(run, RunFolder.ENVIRONMENT, environment)
    preflight = {
        "task": "embedded",
        "rows": {
            "train": {"read": 2400, "kept": 2391, "truncated": 14, "dropped": {"target too long": 9}},
            "validation": {"read": 240, "kept": 240, "truncated": 0, "dropped": {}},
            "test": 120,
        },
        "tokens": {"train": 98_342, "labelled_share": 0.5312, "longest": 87},
        "steps": {"total": steps, "per_epoch": 150, "epochs": steps / 150, "rows_per_step": 16},
        "phases": placed,
        "parameters": {"total": 3_457_280, "trainable": 196_608, "trainable_tensors": 48},
        "notes": ["lm_head is tied to the embedding and stays frozen"],
    }
    _json(run, RunFolder.PREFLIGHT, preflight)
    run.append_event("run_started", name=run.name, fingerprint="1a2b3c4d")


def _write_evaluation(run: RunFolder, bleu: float | None) -> None:
    before = {"bleu": score("bleu", 3.1, 0.6), "rouge_l": score("rouge_l", 18.4, 1.3)}
    whole: dict[str, Any] = {"task": "embedded", "split": "test", "num_examples": 120}
    decoding = {"kind": "greedy", "max_new_tokens": 48, "batch_size": 16}
    half = {"decoding": decoding, "predictions": "predictions.before.jsonl", "seconds": 11.2}
    whole["before"] = {"metrics": before, **half}
    _write_answers(run, "before", "the the the restaurant the <s> & the")
    whole["after"] = None
    if bleu is not None:
        after = {"bleu": score("bleu", bleu, 2.4), "rouge_l": score("rouge_l", bleu + 9, 1.9)}
        whole["after"] = {"metrics": after, **half, "predictions": "predictions.after.jsonl"}
        _write_answers(run, "after", "The Blue Spice is a cheap pub near the riverside.")
    _json(run, "embedded_evaluation.json", whole)


def _write_answers(run: RunFolder, when: str, answer: str) -> None:
    rows = [
        {
            "id": f"test-{i}",
            "source": f"name[The Blue Spice], eatType[pub], priceRange[cheap], area[riverside] <{i}>",
            "prompt": "Describe: ...",
            "prediction": answer,
            "references": [
                "The Blue Spice is a cheap riverside pub.",
                "There is a cheap pub, The Blue Spice.",
            ],
        }
        for i in range(120)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run.path / f"predictions.{when}.jsonl").write_text(text, encoding="utf-8")


def _write_events(
    run: RunFolder, placed: list[dict[str, Any]], steps: int, last: int, seed: int
) -> dict[str, Any] | None:
    random.seed(seed)
    best: dict[str, Any] | None = None
    for step in range(last):
        index = next(i for i, p in enumerate(placed) if p["start_step"] <= step < p["end_step"])
        phase = placed[index]
        name, start = phase["name"], phase["start_step"]
        if step == start:
            counts = {key: phase[key] for key in ("trainable_tensors", "trainable_parameters", "groups")}
            run.append_event(
                "phase_started", phase=name, index=index, learning_rate=2e-3, step=step, **counts
            )
        done = step + 1
        floor = 0.45 + 3.2 * math.exp(-4 * done / steps)
        run.append_event(
            "step", step=done, loss=floor * math.exp(random.gauss(0, 0.12)), learning_rate=2e-3 * (1 - step / steps),
            tokens=done * 640, seconds=round(done * 0.21, 3), phase=name,
        )  # fmt: skip
        if done == start + 2:
            tensors = phase["trainable_tensors"]
            run.append_event(
                "phase_proved", step=done, phase=name, tensors=tensors, steps_needed=2, unreached=[]
            )
        if done % max(1, steps // 10) == 0:
            loss = floor * 1.04 + (0.02 if done > 0.8 * steps else 0)
            run.append_event("validated", step=done, validation_loss=loss, phase=name)
            if best is None or loss < best["validation_loss"]:
                best = {"step": done, "phase": name, "validation_loss": loss}
                run.append_event("checkpoint_saved", step=done, path=f"checkpoint-{done}", seconds=0.1)
    return best


def _write_summary(
    run: RunFolder, placed: list[dict[str, Any]], steps: int, best: dict[str, Any] | None
) -> None:
    evaluation = run.evaluation()
    scores = {w: {n: s["value"] for n, s in evaluation[w]["metrics"].items()} for w in ("before", "after")}
    summary = {
        "name": run.name,
        "status": "finished",
        "task": "embedded",
        "method": "lora",
        "model": "peftlab/tiny-base",
        "scores": scores,
        "counts": {"total_parameters": 3_457_280, "trainable_parameters": 196_608, "trainable_tensors": 48},
        "seconds": {
            "load": 0.8,
            "evaluate_before": 11.2,
            "train": 88.2,
            "evaluate_after": 9.7,
            "total": 112.4,
        },
        "peak_memory_bytes": {"host": 812 << 20, "device": None},
        "tokens_per_second": 3047.6,
        "steps": steps,
        "stopped_early": False,
        "phases": [phase | {"proved": True} for phase in placed],
        "best_checkpoint": best,
        "base_unchanged": True,
    }
    _json(run, RunFolder.SUMMARY, summary)


def _json(run: RunFolder, name: str, value: Any) -> None:
    (run.path / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
