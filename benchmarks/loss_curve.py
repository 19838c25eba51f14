"""Whether a base in bfloat16 learns as one in float32 does: 200 steps, beside what the seed alone changes.

    python benchmarks/loss_curve.py --data_dir E2E --tokenizer GPT2 --figure loss_curve.png

A LoRA on all linear layers is trained by a run's own trainer on the same rows in the same order: in float32 with several
seeds (A's first numbers differ, nothing else), and with the first of these seeds on the base in bfloat16. Losses are means
over 20 steps. The noise is the distance of two float32 seeds, a mean over the steps; what bfloat16 changes must not be
more. With --base embedded the base is the trained one of the package, else a Llama with random weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import training
from lab import StepClock, logged, make_lab_trainer

WINDOW = 20
"""Steps over which a loss is a mean."""
CLIPPED_AT = 1.0


def main() -> None:
    """Train, print the distances, draw the curves; more distance than the seeds' is an error."""
    options = read_options()
    curves = {}
    for dtype in ("float32", "bfloat16"):
        for seed in range(options.seeds if dtype == "float32" else 1):
            curves[dtype, seed] = train(dtype, seed, options)
            print(f"{dtype}, seed {seed}: {curves[dtype, seed][-1]:.4f}", file=sys.stderr, flush=True)
    found = compare(curves)
    print(render(found, options))
    if options.figure:
        draw(curves, options)
    if options.output:
        from peftlab.devices import describe_environment

        record = {"options": {k: str(v) for k, v in vars(options).items()}, "found": found}
        record["curves"] = {f"{dtype}, seed {seed}": losses for (dtype, seed), losses in curves.items()}
        record["environment"] = describe_environment(Path(__file__).parent)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if found["apart"] > found["noise"]:
        raise SystemExit(
            "the loss in bfloat16 is further from that in float32 than seeds are from each other"
        )


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", choices=("random", "embedded"), default="random")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--figure", type=Path, help="a PNG file for the curves")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    options.work = "main"
    if options.base == "embedded":
        options.tokenizer = None
    return options


def train(dtype: str, seed: int, options: argparse.Namespace) -> list[float]:
    """The loss of each step."""
    import torch
    from transformers import AutoModelForCausalLM

    from peftlab.catalog import METHODS
    from peftlab.config import EMBEDDED_BASE
    from peftlab.mapping import map_model
    from peftlab.model_names import SHORT_NAMES

    rows, tokenizer = training.make_rows(options)
    rows = rows[: options.steps * options.batch_size]
    torch.manual_seed(0)
    if options.base == "embedded":
        model = AutoModelForCausalLM.from_pretrained(SHORT_NAMES[EMBEDDED_BASE], dtype=getattr(torch, dtype))
    else:
        model = training.make_model(tokenizer, options).to(getattr(torch, dtype))
    leaf = METHODS.load("lora")
    settings = leaf.Settings(rank=training.RANK, alpha=training.ALPHA, targets="both", dropout=0.0)
    attached = leaf.attach(model, map_model(model), settings, head="causal", seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_lab_trainer(
            attached, tokenizer, rows, Path(folder), StepClock(), steps=options.steps, batch_size=options.batch_size,
            learning_rate=options.learning_rate, clip_norm=CLIPPED_AT,
        )  # fmt: skip
        trainer.train()
    return logged(trainer)


def compare(curves: dict[tuple[str, int], list[float]]) -> dict[str, float]:
    """How far the curves are apart, each a mean over steps of distances of smoothed losses."""
    smoothed = {key: smooth(losses) for key, losses in curves.items()}
    single = [curve for (dtype, _), curve in smoothed.items() if dtype == "float32"]
    pairs = [distance(a, b) for a, b in itertools.combinations(single, 2)]
    return {
        "apart": distance(smoothed["float32", 0], smoothed["bfloat16", 0]),
        "noise": statistics.median(pairs),
        "least_noise": min(pairs),
        "first_loss": curves["float32", 0][0],
        "last_float32": single[0][-1],
        "last_bfloat16": smoothed["bfloat16", 0][-1],
    }


def smooth(losses: list[float]) -> list[float]:
    """Means over the last 20 steps."""
    return [statistics.fmean(losses[end - WINDOW : end]) for end in range(WINDOW, len(losses) + 1)]


def distance(one: list[float], other: list[float]) -> float:
    """The mean over steps of how far two curves are apart."""
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def render(found: dict[str, float], options: argparse.Namespace) -> str:
    """The distances."""
    return "\n".join(
        [
            f"| {options.steps} steps, losses as means of {WINDOW} | |",
            "|---|---:|",
            f"| the loss falls from | {found['first_loss']:.4f} |",
            f"| to, in float32 | {found['last_float32']:.4f} |",
            f"| to, with the base in bfloat16 | {found['last_bfloat16']:.4f} |",
            f"| bfloat16 and float32 of the same seed are apart by | {found['apart']:.5f} |",
            f"| two of {options.seeds} seeds in float32 are apart by (median) | {found['noise']:.5f} |",
            f"| two seeds are apart by at least | {found['least_noise']:.5f} |",
        ]
    )


def draw(curves: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> None:
    """The curves above; below, how far each is from the first seed in float32."""
    from peftlab.figures.canvas import FAINT, GROUP_COLOURS, INK, heading, sheet

    first = smooth(curves["float32", 0])
    steps = range(WINDOW, WINDOW + len(first))
    blue, red = GROUP_COLOURS["attention"], GROUP_COLOURS["mlp"]
    with sheet(options.figure, width=9.0, height=6.0) as figure:
        heading(
            figure,
            "A base in bfloat16 beside one in float32",
            f"Training loss, means over {WINDOW} steps; same rows in the same order, seeds differ in A's first numbers",
        )
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        below.axhline(0, color=INK, linewidth=0.9)
        for (dtype, seed), losses in curves.items():
            own, half = smooth(losses), dtype == "bfloat16"
            look = {
                "color": red if half else blue if seed == 0 else FAINT, "linewidth": 1.8 if half or seed == 0 else 1.2,
                "linestyle": (0, (4, 2)) if half else "-", "zorder": 3 if half or seed == 0 else 2,
            }  # fmt: skip
            name = "bfloat16, seed 0" if half else f"float32, seed {seed}"
            above.plot(steps, own, label=name, **look)
            if half or seed:
                below.plot(steps, [a - b for a, b in zip(own, first, strict=True)], **look)
        above.set_ylabel("loss, nats per token")
        below.set_ylabel("minus float32, seed 0")
        below.set_xlabel("optimizer step")
        figure.legend(loc="outside right upper")


if __name__ == "__main__":
    main()
