"""What looking costs: every probe on, steps with and without them in turn, in one process.

    python benchmarks/probes.py --data_dir E2E --tokenizer GPT2 --output probes.json

The work is that of `training.py`. In every other step no probe wants the gradients. The time inside is all that passes
between the end of the backward pass and clipping: norms of all tensors, the proof of training, groups and layers of every
probe; it is told as a share of its own step, and the median counts. The same steps without any probe must have the same
losses to the bit. With --method adalora the record of ranks is kept too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import training
from lab import StepClock, all_probes, logged, make_lab_trainer, start_alike

MOST = 0.01
"""The share of a step that all probes may take."""


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="half of them with probes; four more warm up")
    parser.add_argument("--method", choices=("lora", "adalora"), default="lora")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    options.work, options.steps = "main", options.steps + 2  # two more are `training`'s own
    found = {watched: train(options, watched=watched) for watched in (True, False)}
    if found[True]["losses"] != found[False]["losses"]:
        raise SystemExit("the losses of steps that are looked at differ from those of steps that are not")
    print(render(found[True]))
    if options.output:
        from peftlab.devices import describe_environment

        record = {"options": {k: str(v) for k, v in vars(options).items()}} | found[True]
        record["environment"] = describe_environment(Path(__file__).parent)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class InsideClock:
    """Takes the time inside proof and probes, for each step.

    Args:
        watch: The trainer's.
    """

    def __init__(self, watch: Any) -> None:
        self.seconds: dict[int, float] = {}
        own = watch.note_gradients

        def timed(step: int, *given: Any, **named: Any) -> None:
            began = time.perf_counter()
            own(step, *given, **named)
            self.seconds[step] = time.perf_counter() - began

        watch.note_gradients = timed


def train(options: argparse.Namespace, *, watched: bool) -> dict[str, Any]:
    """Train with every probe looking at every other step, or with none."""
    import torch

    from peftlab.catalog import METHODS
    from peftlab.mapping import map_model

    rows, tokenizer = training.make_rows(options)
    torch.manual_seed(0)
    model = training.make_model(tokenizer, options).to(getattr(torch, options.dtype))
    leaf = METHODS.load(options.method)
    settings = {"rank": training.RANK, "alpha": training.ALPHA} if options.method == "lora" else {}
    attached = leaf.attach(
        model, map_model(model), leaf.Settings(targets="both", dropout=0.0, **settings), head="causal", seed=0
    )
    start_alike(attached.model)
    probes, clock = all_probes(attached) if watched else {}, StepClock()
    for probe in probes.values():
        wants = probe.wants_gradients
        probe.wants_gradients = lambda step, wants=wants: step % 2 == 0 and wants(step)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_lab_trainer(
            attached, tokenizer, rows, Path(folder), clock, steps=training.num_steps(options),
            batch_size=options.batch_size, probes=probes,
        )  # fmt: skip
        inside = InsideClock(trainer.watch)
        trainer.train()
    print(
        f"{'with' if watched else 'without'} probes: {sum(clock.seconds):.1f} s", file=sys.stderr, flush=True
    )
    steps = range(5, len(clock.seconds) + 1)
    return {
        "probes": sorted(probes),
        "losses": logged(trainer),
        "step_seconds": {
            way: [clock.seconds[step - 1] for step in steps if step % 2 == odd]
            for odd, way in enumerate(("on", "off"))
        },
        "inside_seconds": {
            way: [inside.seconds[step] for step in steps if step % 2 == odd]
            for odd, way in enumerate(("on", "off"))
        },
    }


def render(found: dict[str, Any]) -> str:
    """The table, with the bar."""
    lines = ["| every other step | step | inside | share |", "|---|---:|---:|---:|"]
    shares = {}
    for way, said in (("on", f"all probes: {', '.join(found['probes'])}"), ("off", "the proof alone")):
        steps, inside = found["step_seconds"][way], found["inside_seconds"][way]
        shares[way] = statistics.median(a / b for a, b in zip(inside, steps, strict=True))
        lines.append(
            f"| {said} | {statistics.median(steps) * 1e3:.0f} ms | {statistics.median(inside) * 1e3:.2f} ms"
            f" | {shares[way]:.2%} |"
        )
    verdict = "holds" if shares["on"] <= MOST else "does not hold"
    lines.append(f"\nAt most {MOST:.0%} of a step: {verdict}. Losses are the same to the bit without probes.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
