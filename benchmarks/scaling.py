"""What grows how: seconds of a step and peak memory against rows, length, layers, rank and adapters together.

    python benchmarks/scaling.py --figure scaling.png --output scaling.json
    python benchmarks/scaling.py --short

One thing is varied at a time, from a Llama with random weights and LoRA on all linear layers. peftlab is what a run has, its
base in the dtype that a run would choose; the peer is the plain Trainer in float32, rows padded to the longest. All rows
have equally many tokens, so that neither gains from pads. Each cell is a process of its own, in turn; the median step
counts, and memory is the process's peak above what it held before the model. The growth is the exponent p of x^p that fits
best (least squares of logarithms). Losses of the two must be equal. Adapters together come from `joint.py`'s trainers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import training
from lab import StepClock, logged, make_lab_trainer, make_parts, start_alike

CONTENDERS = {"trainer": "plain Trainer, float32", "peftlab": "peftlab"}
AXES: dict[str, dict[str, list[int]]] = {
    "full": {
        "rows": [2, 4, 8, 16, 32],
        "length": [32, 64, 128, 256, 512],
        "layers": [2, 4, 8, 16],
        "rank": [2, 8, 32, 128],
        "adapters": [1, 2, 4],
    },
    "short": {"rows": [2, 8, 16], "length": [32, 64, 192], "layers": [2, 4, 8], "rank": [2, 8, 64], "adapters": [1, 4]},
}  # fmt: skip
MIDDLE = {
    "full": {"rows": 8, "length": 64, "layers": 4, "rank": 8, "adapters": 1, "hidden": 768},
    "short": {"rows": 8, "length": 64, "layers": 4, "rank": 8, "adapters": 1, "hidden": 512},
}
VOCABULARY = 8192
UNITS = {
    "rows": "rows of a step",
    "length": "tokens of a row",
    "layers": "layers",
    "rank": "rank",
    "adapters": "adapters",
}
WARM_UP = 1
CLOSE = 5e-3
"""How far losses may be apart, as a share: one contender's base is in bfloat16."""


def main() -> None:
    """Measure all cells, print the table, draw where asked."""
    options = read_options()
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell), options.contender, options.steps)))
        return
    form = "short" if options.short else "full"
    cells: dict[str, dict[str, Any]] = {}
    for axis, values in AXES[form].items():
        for value in values:
            for name in CONTENDERS:
                cell = MIDDLE[form] | {axis: value}
                if cell["adapters"] > 1 and name == "trainer":
                    continue
                key = json.dumps([name, cell])
                if key not in cells:
                    cells[key] = in_own_process(name, cell, options)
                    found = cells[key]
                    print(f"{name} {axis} {value}: {found['seconds']:.3f} s", file=sys.stderr, flush=True)
    curves = gather(cells, form)
    print(render(curves))
    if options.figure:
        draw(curves, options.figure, MIDDLE[form])
    if options.output:
        from peftlab.devices import describe_environment

        record = {"form": form, "middle": MIDDLE[form], "curves": curves}
        record["environment"] = describe_environment(Path(__file__).parent)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer values of a smaller model")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a cell; one more warms up")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--figure", type=Path, help="a PNG file for the panels")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def in_own_process(name: str, cell: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """One cell, from a process of its own."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell), "--contender", name]
    command += ["--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} {cell} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(cell: dict[str, int], contender: str, steps: int) -> dict[str, Any]:
    """Seconds of the median step, peak of memory above the start, and losses of one cell."""
    import torch

    from peftlab.devices import peak_memory, report_memory

    before = report_memory().process_bytes
    rows, tokenizer = make_rows(cell, steps), training_tokenizer()
    torch.manual_seed(0)
    model = make_model(cell)
    clock = StepClock()
    run = run_trainer if contender == "trainer" else run_together if cell["adapters"] > 1 else run_peftlab
    losses = run(model, tokenizer, rows, clock, cell)
    return {
        "seconds": statistics.median(clock.seconds[WARM_UP:]),
        "bytes": (peak_memory()["host"] or 0) - before,
        "losses": losses,
    }


def make_rows(cell: dict[str, int], steps: int) -> list[Any]:
    """Rows of random tokens, all with a label."""
    import random

    from peftlab.batches import Row

    source = random.Random(0)
    rows = []
    for number in range((steps + WARM_UP) * cell["rows"]):
        ids = [source.randrange(2, VOCABULARY) for _ in range(cell["length"])]
        rows.append(Row(str(number), ids, list(ids)))
    return rows


def training_tokenizer() -> Any:
    """What the trainers ask of a tokenizer here: its pad."""
    return argparse.Namespace(pad_token_id=1)


def make_model(cell: dict[str, int]) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = cell["hidden"]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden * 2 // 3,
            num_hidden_layers=cell["layers"], num_attention_heads=hidden // 64, tie_word_embeddings=True, pad_token_id=1,
        )
    )  # fmt: skip


def attach(model: Any, cell: dict[str, int]) -> Any:
    """The LoRA of both contenders."""
    from peftlab.catalog import METHODS
    from peftlab.mapping import map_model

    leaf = METHODS.load("lora")
    settings = leaf.Settings(rank=cell["rank"], alpha=2 * cell["rank"], targets="both", dropout=0.0)
    attached = leaf.attach(model, map_model(model), settings, head="causal", seed=0)
    start_alike(attached.model)
    return attached


def run_dtype(hidden: int) -> Any:
    """The dtype that a run would choose for a base on this machine."""
    import torch

    from peftlab.devices import bfloat16_instructions
    from peftlab.precision import NARROWEST, bfloat16_gain

    fast = bfloat16_instructions() and hidden >= NARROWEST and bfloat16_gain(hidden) >= 1.3
    return torch.bfloat16 if fast else torch.float32


def run_peftlab(
    model: Any, tokenizer: Any, rows: list[Any], clock: StepClock, cell: dict[str, int]
) -> list[float]:
    """A run's own trainer."""
    attached = attach(model.to(run_dtype(cell["hidden"])), cell)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_lab_trainer(
            attached,
            tokenizer,
            rows,
            Path(folder),
            clock,
            steps=len(rows) // cell["rows"],
            batch_size=cell["rows"],
        )
        trainer.train()
    return logged(trainer)


def run_trainer(
    model: Any, tokenizer: Any, rows: list[Any], clock: StepClock, cell: dict[str, int]
) -> list[float]:
    """The plain Trainer with the same adapter of peft."""
    from transformers import Trainer, TrainingArguments

    from peftlab.batches import Collator

    attached = attach(model, cell)
    options = argparse.Namespace(
        work="main", batch_size=cell["rows"], steps=len(rows) // cell["rows"] - training.WARM_UP
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            attached.model,
            TrainingArguments(remove_unused_columns=False, **training.plain_arguments(options, folder)),
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id, "causal"),
            callbacks=[clock.callback()],
        )
        trainer.train()
    return logged(trainer)


def run_together(
    model: Any, tokenizer: Any, rows: list[Any], clock: StepClock, cell: dict[str, int]
) -> list[float]:
    """Several adapters in one pass of the base, each on the same rows; one step moves all of them."""
    from joint import RoundClock

    from peftlab.joint.adapters import AdapterOfRun, JoinedAdapters
    from peftlab.joint.training import JointRun, train_together
    from peftlab.mapping import map_model
    from peftlab.methods.lora import Settings

    settings = Settings(rank=cell["rank"], alpha=2 * cell["rank"], targets="both", dropout=0.0)
    adapters = {f"run{number}": AdapterOfRun(settings, number) for number in range(cell["adapters"])}
    model = model.to(run_dtype(cell["hidden"]))
    joined = JoinedAdapters(model, map_model(model), adapters, head="causal")
    runs, rounds = {}, RoundClock()
    with tempfile.TemporaryDirectory() as folder:
        for name in adapters:
            with joined.alone(name):
                parts, arguments = make_parts(
                    joined.attachments[name], tokenizer, rows, Path(folder) / name, steps=len(rows) // cell["rows"],
                    batch_size=cell["rows"],
                )  # fmt: skip
            runs[name] = JointRun(parts, arguments, () if runs else (rounds.callback(),))
        trainers = train_together(joined, runs)
    clock.seconds = rounds.seconds
    return logged(trainers["run0"])


def gather(cells: dict[str, dict[str, Any]], form: str) -> dict[str, dict[str, Any]]:
    """Axis to contender to its values, with the growth; losses that differ end it."""
    for key, found in cells.items():
        name, cell = json.loads(key)
        other = cells.get(json.dumps(["trainer", cell])) if name == "peftlab" else None
        if other is not None:
            far = max(abs(a - b) / abs(a) for a, b in zip(other["losses"], found["losses"], strict=True))
            if far > CLOSE:
                raise SystemExit(f"{cell}: losses of the two are apart by {far:.2%}")
    curves: dict[str, dict[str, Any]] = {}
    for axis, values in AXES[form].items():
        curves[axis] = {}
        for name in CONTENDERS:
            found = {v: cells.get(json.dumps([name, MIDDLE[form] | {axis: v}])) for v in values}
            known = {value: one for value, one in found.items() if one is not None}
            if len(known) < 2:
                continue
            curves[axis][name] = {"values": list(known)} | {
                figure: {
                    "all": [one[figure] for one in known.values()],
                    "growth": growth(list(known), [one[figure] for one in known.values()]),
                }
                for figure in ("seconds", "bytes")
            }
    return curves


def growth(values: list[int], costs: list[float]) -> float:
    """The p of x^p that fits best."""
    logs = [(math.log(v), math.log(c)) for v, c in zip(values, costs, strict=True)]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def render(curves: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = ["| against | | seconds of a step | grow as | peak MiB | grow as |", "|---|---|---|---|---|---|"]
    for axis, found in curves.items():
        for name, curve in found.items():
            values = ", ".join(map(str, curve["values"]))
            seconds = ", ".join(f"{s:.2f}" for s in curve["seconds"]["all"])
            peaks = ", ".join(f"{b / 2**20:.0f}" for b in curve["bytes"]["all"])
            powers = [f"{axis}^{curve[figure]['growth']:.2f}" for figure in ("seconds", "bytes")]
            lines.append(
                f"| {axis}: {values} | {CONTENDERS[name]} | {seconds} | {powers[0]} | {peaks} | {powers[1]} |"
            )
    return "\n".join(lines)


def draw(curves: dict[str, dict[str, Any]], path: Path, middle: dict[str, int]) -> None:
    """Small panels: seconds above, memory below; one column for each thing that is varied."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

    from peftlab.figures.canvas import GROUP_COLOURS, heading, sheet

    colours = {"trainer": GROUP_COLOURS["mlp"], "peftlab": GROUP_COLOURS["attention"]}
    with sheet(path, width=13.5, height=6.2) as figure:
        heading(
            figure,
            "What grows how",
            f"Llama of {middle['layers']} layers and {middle['hidden']} features, LoRA of rank {middle['rank']},"
            f" {middle['rows']} rows of {middle['length']} tokens, one thing varied at a time; the numbers are exponents",
        )
        panels = figure.subplots(2, len(curves), sharey="row")
        for column, (axis, found) in enumerate(curves.items()):
            for row, (key, scale) in enumerate((("seconds", 1.0), ("bytes", 2**20))):
                panel = panels[row][column]
                for name, curve in found.items():
                    costs = [cost / scale for cost in curve[key]["all"]]
                    panel.loglog(
                        curve["values"], costs, "o-", color=colours[name], markersize=4, linewidth=1.7
                    )
                    panel.annotate(
                        f"{curve[key]['growth']:.2f}", (curve["values"][-1], costs[-1]), xytext=(6, 0),
                        textcoords="offset points", color=colours[name], va="center", annotation_clip=False,
                    )  # fmt: skip
                ticks = sorted({value for curve in found.values() for value in curve["values"]})
                panel.xaxis.set_major_locator(FixedLocator(ticks))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.set_xticklabels([str(tick) for tick in ticks])
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_minor_formatter(NullFormatter())
                panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                if row:
                    panel.set_xlabel(UNITS[axis])
        panels[0][0].set_ylabel("seconds of a step")
        panels[1][0].set_ylabel("peak above start, MiB")
        for name, label in CONTENDERS.items():
            panels[0][0].plot([], [], "o-", color=colours[name], label=label)
        figure.legend(loc="outside lower left", ncols=2)


if __name__ == "__main__":
    main()
