"""The peak memory of a training step: predicted from a config, measured under the profiler, and what others would say.

    python benchmarks/memory_prediction.py --output memory_prediction.json

Grid: Llama-, GPT-2-, BERT- (classification) and T5-like models with random weights x LoRA, all weights x plain, checkpointed
x float32, bfloat16 x lengths. Each cell is predicted by carrying the run's own trainer out on tensors without data, then
the same trainer takes the same steps with data under torch's profiler, in one process.

- accelerate: `accelerate estimate-memory`, by its own functions: the weights, times four in training; it knows no batch.
- formula: weights, gradients and AdamW's moments, and for activations s b h L (34 + 5 a s / h) bytes in half precision,
  2 s b h L where checkpointed (Korthikanti et al. 2022, arXiv 2205.05198, equations 2 and 6).

Then some runs in processes of their own show what a process holds beside tensors, as glibc is and with its remedy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes

from peftlab.config import RunConfig, build_config
from peftlab.devices import describe_environment
from peftlab.loading import switch_checkpointing
from peftlab.mapping import map_model
from peftlab.memory.budget import GLIBC_REMEDY
from peftlab.memory.measuring import measure_step
from peftlab.memory.prediction import attach_method, build_structure, find_structure, predict_memory
from peftlab.memory.steps import BatchShape
from peftlab.method import OrdinaryTraining

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
}


class Whole(OrdinaryTraining):
    """Full fine-tuning: every parameter trains."""

    rewritten: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self.answering, self.family = model, model, map_model(model)
        model.requires_grad_(True)

    def parameters(self) -> dict[str, Any]:
        """All of them."""
        return dict(self.model.named_parameters())

    def steps_to_train(self, name: str) -> int:
        """One."""
        return 1

    def begin(self, schedule: Any) -> None:
        """Nothing to begin."""

    def after_step(self, step: int) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        family: The architecture.
        trains: "lora" or "full".
        checkpointed: Whether activations are computed again.
        dtype: Of the weights.
        rows: Of the batch.
        length: Tokens of a row.
    """

    family: str
    trains: str
    checkpointed: bool
    dtype: str
    rows: int
    length: int

    @property
    def shape(self) -> BatchShape:
        """Its longest batch."""
        return BatchShape(self.rows, self.length, self.length)

    @property
    def attach(self) -> Any:
        """Makes its base tunable; None for the config's method."""
        return Whole if self.trains == "full" else None

    def config(self, folder: Path) -> RunConfig:
        """Its config."""
        model = {"name": str(folder / self.family), "dtype": self.dtype, "device": "cpu"}
        return build_config(
            {
                "model": model | {"gradient_checkpointing": self.checkpointed},
                "training": {"warmup_steps": 0, "batch_size": self.rows},
            }
        )


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    options = read_options()
    if options.process:
        print(json.dumps(run_in_process(Cell(**json.loads(options.process)), options)))
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_configs(folder, options)
        rows = list(measure_grid(folder, options))
        processes = list(measure_processes(options))
    errors = sorted(abs(row["error"]) for row in rows)
    print(f"largest error {errors[-1]:.2%}, median {errors[len(errors) // 2]:.2%} of {len(errors)} cells")
    if options.output:
        record = {
            "options": {key: str(value) for key, value in vars(options).items()},
            "rows": rows,
            "processes": processes,
            "environment": describe_environment(Path(__file__).parent),
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="*", default=["llama", "gpt2", "bert", "t5"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[128, 1024])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no_processes", action="store_true", help="leave the runs in processes out")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def save_configs(folder: Path, options: argparse.Namespace) -> None:
    """Write the `config.json` of each family; there are no weights."""
    hidden, layers, vocabulary = options.hidden, options.layers, options.vocabulary
    heads, longest = max(1, hidden // 64), max([1024, *options.lengths])
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2), intermediate_size=hidden * 11 // 4, max_position_embeddings=longest,
        **ends,
    ).save_pretrained(folder / "llama")  # fmt: skip
    transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=longest, **ends
    ).save_pretrained(folder / "gpt2")
    transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=longest, num_labels=3, pad_token_id=0,
    ).save_pretrained(folder / "bert")  # fmt: skip
    transformers.T5Config(
        vocab_size=vocabulary, d_model=hidden, num_layers=layers // 2, d_kv=hidden // heads, d_ff=4 * hidden,
        num_heads=heads, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    ).save_pretrained(folder / "t5")  # fmt: skip


def measure_grid(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predict and measure every cell and print its row."""
    print(
        f"{'cell':46}{'measured':>10}{'predicted':>11}{'error':>8}{'accelerate':>12}{'formula':>10}  MiB; seconds"
    )
    grid = itertools.product(
        options.families, ("lora", "full"), (False, True), DTYPES, [options.rows], options.lengths
    )
    for cell in itertools.starmap(Cell, grid):
        config = cell.config(folder)
        predicted = predict_memory(config, shape=cell.shape, attach=cell.attach)
        began = time.perf_counter()
        measured = take_step(cell, config)
        seconds = time.perf_counter() - began
        row = asdict(cell) | {
            "measured_bytes": measured,
            "predicted_bytes": predicted.peak_bytes,
            "parts": dict(predicted.parts),
            "error": predicted.peak_bytes / measured - 1,
            "accelerate_bytes": accelerate_estimate(cell, config),
            "formula_bytes": formula(cell, config),
            "prediction_seconds": predicted.seconds,
            "measurement_seconds": seconds,
        }
        name = f"{cell.family} {cell.trains} {cell.dtype} {cell.rows}x{cell.length}"
        figures = [row[key] / 2**20 for key in ("measured_bytes", "predicted_bytes")]
        others = [row[key] / 2**20 for key in ("accelerate_bytes", "formula_bytes")]
        print(
            f"{name + ' checkpointed' * cell.checkpointed:46}{figures[0]:10.1f}{figures[1]:11.1f}{row['error']:8.2%}"
            f"{others[0]:12.1f}{others[1]:10.1f}  {predicted.seconds:.1f}",
            flush=True,
        )
        yield row


def take_step(cell: Cell, config: RunConfig) -> int:
    """The measured peak of the run's first steps on random weights, in bytes."""
    source = find_structure(config)
    torch.manual_seed(0)
    model = HEADS[source.head].from_config(source.config, dtype=DTYPES[cell.dtype]).eval()
    if cell.checkpointed:
        switch_checkpointing(model, True)
    attachment = (cell.attach or attach_method(config, source))(model)
    vocabulary = source.config.get_text_config().vocab_size
    return measure_step(attachment, config, cell.shape, head=source.head, vocabulary=vocabulary).peak_bytes


def accelerate_estimate(cell: Cell, config: RunConfig) -> int:
    """What `accelerate estimate-memory` calls the peak of training with Adam, in bytes."""
    model = build_structure(find_structure(config), dtype=torch.float32, checkpointing=False)
    total, _ = calculate_maximum_sizes(model)
    return int(max(estimate_training_usage(int(total), cell.dtype).values()))


def formula(cell: Cell, config: RunConfig) -> int:
    """The textbook's sum, in bytes."""
    source = find_structure(config)
    base = build_structure(source, dtype=DTYPES[cell.dtype], checkpointing=False)
    attachment = (cell.attach or attach_method(config, source))(base)
    weights = sum(p.numel() * p.itemsize for p in attachment.model.parameters())
    trained = sum(p.numel() * p.itemsize for p in attachment.parameters().values())
    sizes = source.config.get_text_config()
    layers = sizes.num_hidden_layers * (2 if source.head == "seq2seq" else 1)
    hidden, heads, itemsize = sizes.hidden_size, sizes.num_attention_heads, DTYPES[cell.dtype].itemsize
    tokens = cell.rows * cell.length
    half = 2 * tokens * hidden * layers
    if not cell.checkpointed:
        half = int(tokens * hidden * layers * (34 + 5 * heads * cell.length / hidden))
    return weights + 3 * trained + half * itemsize // 2


def measure_processes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What processes hold for the bytes that their tensors take, with glibc as it is and with its remedy."""
    if options.no_processes:
        return
    print(
        "\nrun in a process of its own                       predicted  held  x as it is  x with the remedy  MiB"
    )
    variable, _, value = GLIBC_REMEDY.partition("=")
    for trains, checkpointed, dtype in (
        ("lora", False, "float32"),
        ("lora", True, "float32"),
        ("lora", True, "bfloat16"),
        ("full", False, "float32"),
    ):
        cell = Cell("llama", trains, checkpointed, dtype, 4, 512)
        held = {}
        for name, environment in (("as it is", {}), ("remedied", {variable: value})):
            wide = [
                "--hidden",
                "512",
                "--layers",
                "6",
                "--vocabulary",
                "8192",
                "--threads",
                str(options.threads),
            ]
            done = subprocess.run(
                [sys.executable, __file__, "--process", json.dumps(asdict(cell)), *wide],
                env=os.environ | environment, capture_output=True, text=True, check=True,
            )  # fmt: skip
            held[name] = json.loads(done.stdout.splitlines()[-1])
        as_it_is, remedied = held["as it is"], held["remedied"]
        row = asdict(cell) | {
            "runs": held,
            "held_share": as_it_is["held_bytes"] / as_it_is["predicted_bytes"],
            "remedied_share": remedied["held_bytes"] / remedied["predicted_bytes"],
            "remedied_time": remedied["processor_seconds"] / as_it_is["processor_seconds"],
        }
        print(
            f"{f'llama {trains} {dtype} 4x512' + ' checkpointed' * checkpointed:46}"
            f"{as_it_is['predicted_bytes'] / 2**20:10.0f}{as_it_is['held_bytes'] / 2**20:8.0f}"
            f"{row['held_share']:6.2f}{row['remedied_share']:12.2f}{row['remedied_time']:8.2f}",
            flush=True,
        )
        yield row


def run_in_process(cell: Cell, options: argparse.Namespace) -> dict[str, float]:
    """Take the steps of a cell without a profiler; what this process held at most beside what it began with."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        save_configs(Path(name), options)
        config = cell.config(Path(name))
        predicted = predict_memory(config, shape=cell.shape, attach=cell.attach).peak_bytes
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        began = time.process_time()
        with patch("peftlab.memory.measuring.measured_peak", lambda _: nullcontext([0])):
            take_step(cell, config)
        seconds = time.process_time() - began
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    return {"predicted_bytes": predicted, "held_bytes": peak - before, "processor_seconds": seconds}


if __name__ == "__main__":
    main()
