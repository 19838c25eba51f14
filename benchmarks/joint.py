"""Several adapters in one pass of the base: four LoRA configs together, against one after another, in one run.

    python benchmarks/joint.py --data_dir E2E --tokenizer GPT2
    python benchmarks/joint.py --short               2 rows a step alone, few steps
    python benchmarks/joint.py --rows 2 16 --dtypes float32 bfloat16 --output joint.json

The model is that of `training.py`: a Llama with random weights. The four runs differ in rank, alpha, learning rate, seed
and so in their rows. Each run alone has a process of its own, and so have the four together, in turn, as often as --repeats
says; medians count. Seconds are those of steps, all that lies between two of them counted; the first steps warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import training

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"rank": 4, "alpha": 8, "rate": 1e-4, "seed": 1},
    "usual": {"rank": 8, "alpha": 16, "rate": 2e-4, "seed": 2},
    "wide": {"rank": 16, "alpha": 32, "rate": 1e-4, "seed": 3},
    "fast": {"rank": 8, "alpha": 16, "rate": 4e-4, "seed": 4},
}
WARM_UP = 2
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far two losses may differ that are the same."""


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    options = read_options()
    if options.contender:
        print(json.dumps(measure(options.contender, options)))
        return
    found = []
    for dtype in options.dtypes:
        for rows in options.rows:
            found.append(compare(dtype, rows, options))
            print(render(found[-1:]), file=sys.stderr, flush=True)
    print(render(found))
    if options.output:
        from peftlab.devices import describe_environment

        record = {"options": {k: str(v) for k, v in vars(options).items()}, "rows": found}
        record["environment"] = describe_environment(Path(__file__).parent)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16], help="rows of each run's step")
    parser.add_argument("--dtypes", nargs="+", choices=CLOSE, default=["float32", "bfloat16"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=8, help="timed steps; two more warm up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--short", action="store_true", help="one repeat of 2 rows a step, in the last dtype alone"
    )
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    if options.short:
        options.rows, options.repeats, options.dtypes = [2], 1, options.dtypes[-1:]
    options.work, options.batch_size = "main", 16  # as `training.make_rows` reads them
    return options


def compare(dtype: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Four runs alone and together, in turn."""
    alone: dict[str, list[dict[str, Any]]] = {name: [] for name in CONFIGS}
    together = []
    for _ in range(options.repeats):
        for name in CONFIGS:
            alone[name].append(in_own_process(name, dtype, rows, options))
        together.append(in_own_process("together", dtype, rows, options))
    apart = 0.0
    for name in CONFIGS:
        for one, other in zip(alone[name][0]["losses"][name], together[0]["losses"][name], strict=True):
            apart = max(apart, abs(one - other) / max(1.0, abs(one)))
    if apart > CLOSE[dtype]:
        raise SystemExit(f"{dtype}, {rows} rows: losses differ by {apart:.2g}")
    seconds = sum(statistics.median(one["seconds"] for one in found) for found in alone.values())
    memory = sum(statistics.median(one["peak_memory_bytes"] for one in found) for found in alone.values())
    own = statistics.median(one["seconds"] for one in together)
    peak = statistics.median(one["peak_memory_bytes"] for one in together)
    return {
        "dtype": dtype, "rows": rows, "alone_seconds": seconds, "together_seconds": own, "gain": seconds / own,
        "alone_bytes": memory, "together_bytes": peak, "memory": peak / memory, "apart": apart,
        "all": [round(one["seconds"], 4) for one in together],
    }  # fmt: skip


def in_own_process(name: str, dtype: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """One contender's measurement, from a process of its own."""
    same = [
        f"--{key}={value}"
        for key, value in vars(options).items()
        if value is not None and key in ("layers", "hidden", "steps", "data_dir", "tokenizer", "dropout")
    ]
    command = [sys.executable, __file__, f"--contender={name}", "--dtypes", dtype, "--rows", str(rows), *same]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run, or all together: seconds of a step, losses of each run, and the peak of the process's memory."""
    import torch
    from transformers import set_seed

    from peftlab.devices import peak_memory

    rows, tokenizer = training.make_rows(options)
    set_seed(0)
    model = training.make_model(tokenizer, options).to(getattr(torch, options.dtypes[0]))
    clock = RoundClock()
    with tempfile.TemporaryDirectory() as folder:
        train = train_together if contender == "together" else train_alone
        losses = train(contender, model, tokenizer, rows, clock, Path(folder), options)
    return {
        "seconds": statistics.median(clock.seconds[WARM_UP:]),
        "losses": losses,
        "peak_memory_bytes": peak_memory()["host"],
    }


class RoundClock:
    """Seconds from the end of one step of a run to the end of its next: of runs that train together, one round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def callback(self) -> Any:
        """A transformers callback."""
        from transformers import TrainerCallback

        clock = self

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock._last = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = time.perf_counter()
                clock.seconds.append(now - (clock._last or now))
                clock._last = now

        return Clock()


def settings(name: str, options: argparse.Namespace) -> Any:
    """LoRA's settings of one run."""
    from peftlab.methods.lora import Settings

    own = CONFIGS[name]
    return Settings(rank=own["rank"], alpha=own["alpha"], targets="both", dropout=options.dropout)


def prepare(
    name: str, attached: Any, tokenizer: Any, rows: list[Any], folder: Path, options: argparse.Namespace
) -> tuple[Any, Any]:
    """What the trainer of one run is made of, as a run has it."""
    from peftlab.batches import Collator
    from peftlab.config import build_config
    from peftlab.step_engine import choose_engine
    from peftlab.training import TrainingParts, make_arguments

    steps, own = options.steps + WARM_UP, CONFIGS[name]
    config = build_config(
        {
            "training": {
                "max_steps": steps, "batch_size": options.rows[0], "learning_rate": own["rate"], "warmup_steps": 0,
                "curve": "constant", "validation_steps": steps + 1, "save_steps": steps + 1, "seed": own["seed"],
            },
            "model": {"device": "cpu"},
        }
    )  # fmt: skip
    pad_id, schedule = tokenizer.pad_token_id, config.make_schedule()
    engine = choose_engine(attached, rows, config.training, head="causal", pad_id=pad_id)
    print(engine.found, file=sys.stderr)
    parts = TrainingParts(
        attached, schedule, engine.objective, Collator(pad_id, "causal"), rows, rows[:1], isolation=engine.isolation,
        seed=own["seed"],
    )  # fmt: skip
    arguments = make_arguments(config, folder / name, schedule)
    arguments.save_strategy = arguments.eval_strategy = "no"
    return parts, arguments


def train_alone(
    name: str, model: Any, tokenizer: Any, rows: list[Any], clock: RoundClock, folder: Path,
    options: argparse.Namespace,
) -> dict[str, list[float]]:  # fmt: skip
    """One run."""
    from peftlab.mapping import map_model
    from peftlab.methods.lora import attach
    from peftlab.trainer import LabTrainer

    seed = CONFIGS[name]["seed"]
    attached = attach(model, map_model(model), settings(name, options), head="causal", seed=seed)
    parts, arguments = prepare(name, attached, tokenizer, rows, folder, options)
    trainer = LabTrainer(parts, arguments, [clock.callback()])
    trainer.train()
    return {name: training.logged(trainer)}


def train_together(
    _: str, model: Any, tokenizer: Any, rows: list[Any], clock: RoundClock, folder: Path,
    options: argparse.Namespace,
) -> dict[str, list[float]]:  # fmt: skip
    """All runs over one base."""
    from peftlab.joint.adapters import AdapterOfRun, JoinedAdapters
    from peftlab.joint.training import JointRun, train_together
    from peftlab.mapping import map_model

    adapters = {name: AdapterOfRun(settings(name, options), own["seed"]) for name, own in CONFIGS.items()}
    joined = JoinedAdapters(model, map_model(model), adapters, head="causal")
    runs = {}
    for number, name in enumerate(CONFIGS):
        with joined.alone(name):
            parts, arguments = prepare(name, joined.attachments[name], tokenizer, rows, folder, options)
        runs[name] = JointRun(parts, arguments, () if number else (clock.callback(),))
    trainers = train_together(joined, runs)
    return {name: training.logged(trainer) for name, trainer in trainers.items()}


def render(found: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| base | rows of each | one after another, s | together, s | gain | memory, MiB | of the sum | losses differ by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        lines.append(
            f"| {row['dtype']} | {row['rows']} | {row['alone_seconds']:.3f} | {row['together_seconds']:.3f} |"
            f" {row['gain']:.2f} x | {row['together_bytes'] / 2**20:.0f} | {row['memory']:.2f} | {row['apart']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
