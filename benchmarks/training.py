"""Adapters on a 12-layer Llama: useful tokens per second and peak memory of the stock trainers and of peftlab, in one run.

    python benchmarks/training.py --data_dir E2E --tokenizer GPT2 --output training.json
    python benchmarks/training.py --work top2        LoRA on the top two layers, the third epoch
    python benchmarks/training.py --work new_layer   a new layer at the end of a frozen base, five epochs as a whole

The model has random weights, LoRA of rank 8 is on linear layers without dropout, and every contender takes the same rows
in the same order, 16 a step; only answers carry a label. A useful token is one that is no pad. Each contender runs in a
process of its own, in turn, as often as --repeats says; the median counts. TRL is measured where it is installed. The
machine's limit is measured beside them: the products of one step (2 flops for each weight and token forwards, 2 backwards,
since the base's own gradients are not needed, and the head at labelled tokens alone) at the speed of a large product.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab import StepClock, logged, make_lab_trainer, start_alike
from limits import product_speeds, products
from repeats import median_of, median_ratio, read_repeats, write_repeats

CONTENDERS = {
    "trainer_padded": "transformers Trainer, padded to 128, float32",
    "trainer_dynamic": "transformers Trainer, padded to the longest, float32",
    "trl_default": "TRL SFTTrainer, as it comes",
    "trl_best": "TRL SFTTrainer, bfloat16 weights, no checkpointing",
    "peftlab_float32": "peftlab, float32",
    "peftlab_uncached": "peftlab, no hidden states kept",
    "peftlab": "peftlab",
}
HALF = ("trl_default", "trl_best", "peftlab", "peftlab_uncached")
"""Contenders that compute in bfloat16."""
SAME, SAME_HALF = 1e-4, 3e-3
"""How far losses may be apart, as a share."""
RANK, ALPHA, RATE, LONGEST, WARM_UP = 8, 16, 2e-4, 128, 2
WORKS = {
    "main": (
        1,
        ["trainer_padded", "trainer_dynamic", "trl_default", "trl_best", "peftlab_float32", "peftlab"],
    ),
    "top2": (3, ["trl_default", "peftlab_uncached", "peftlab"]),
    "new_layer": (5, ["trainer_padded", "trainer_dynamic", "peftlab_float32", "peftlab"]),
}
"""Work to its epochs, and the contenders that can do it."""
ABOUT = ("work", "layers", "hidden", "batch_size", "steps", "data_dir", "tokenizer")
"""The options that say what is measured."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure every contender, print a table, write JSON where asked."""
    options = read_options()
    if options.contender:
        print(json.dumps(measure(options.contender, options)))
        return
    names = [n for n in WORKS[options.work][1] if not options.only or n in options.only]
    if importlib.util.find_spec("trl") is None and not options.trl_python:
        names = [n for n in names if not n.startswith("trl")]
    about = {key: str(getattr(options, key)) for key in ABOUT} | {"contenders": ", ".join(names)}
    repeats = read_repeats(options.append, about)
    for _ in range(options.repeats):
        repeat: dict[str, Any] = {}
        for name in names:
            repeat[name] = in_own_process(name, options)
            told = f"{len(repeats) + 1}: {name}: {repeat[name]['tokens_per_second']:.0f} tokens/s"
            print(told, file=sys.stderr, flush=True)
        repeat["limits"] = machine_limit(options)
        repeats.append(repeat)
        for path in filter(None, (options.append, options.output)):
            write_repeats(path, about, repeats)
    print(render(repeats, names, options.work))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", choices=WORKS, default="main")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch; two more warm up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--trl_python", help="the python of another environment, with TRL")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--append", type=Path, help="a JSON file of repeats: these join them, all count")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def in_own_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One contender's measurement, from a process of its own."""
    python = options.trl_python if name.startswith("trl") and options.trl_python else sys.executable
    same = [f"--{key}={value}" for key, value in vars(options).items() if value is not None and key in ABOUT]
    done = subprocess.run(
        [python, __file__, f"--contender={name}", *same],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")},  # peftlab for another python too
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train with one contender: seconds and loss of each step, and the peak of memory above the start."""
    import torch
    from transformers import set_seed

    from peftlab.devices import peak_memory

    rows, tokenizer = make_rows(options)
    set_seed(0)
    dtype = torch.bfloat16 if name in ("trl_best", "peftlab", "peftlab_uncached") else torch.float32
    model = make_model(tokenizer, options).to(dtype)
    clock = StepClock()
    run = run_peftlab if name.startswith("peftlab") else run_trl if name.startswith("trl") else run_trainer
    began = time.perf_counter()
    losses = run(name, model, tokenizer, rows, clock, options)
    whole = time.perf_counter() - began
    size, epochs = options.batch_size, WORKS[options.work][0]
    tokens = [
        sum(len(row.input_ids) for row in rows[i : i + size]) for i in range(0, len(rows), size)
    ] * epochs
    timed = slice(WARM_UP if epochs == 1 else len(tokens) * 2 // 3, None)
    if options.work == "new_layer":  # what is computed once for all epochs counts
        rate = sum(tokens) / whole
    else:
        rate = sum(tokens[timed]) / sum(clock.seconds[timed])
    return {
        "seconds": clock.seconds,
        "whole_seconds": whole,
        "losses": losses,
        "tokens_per_second": rate,
        "peak_memory_bytes": peak_memory()["host"],
    }


def make_rows(options: argparse.Namespace) -> tuple[list[Any], Any]:
    """The rows of all steps in their order, and the tokenizer."""
    from transformers import AutoTokenizer

    from peftlab.batches import RowBuilder
    from peftlab.catalog import TASKS
    from peftlab.config import EMBEDDED_BASE, TaskSettings
    from peftlab.model_names import SHORT_NAMES
    from peftlab.task_data import load_splits

    name = "e2e_nlg" if options.data_dir else "embedded"
    splits = load_splits(TaskSettings(name=name, data_dir=options.data_dir), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or SHORT_NAMES[EMBEDDED_BASE])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    builder = RowBuilder(tokenizer, prompt=TASKS.load(name).PROMPT, head="causal", max_length=LONGEST)
    rows, _ = builder.build(splits.train)
    random.Random(0).shuffle(rows)
    return rows[: num_steps(options) * options.batch_size], tokenizer


def num_steps(options: argparse.Namespace) -> int:
    """Steps of one epoch."""
    return int(options.steps) + (WARM_UP if WORKS[options.work][0] == 1 else 0)


def make_model(tokenizer: Any, options: argparse.Namespace) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden * 2 // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def lora_config(options: argparse.Namespace) -> Any:
    """The LoRA of every contender but peftlab, which makes the same one."""
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, lora_dropout=0.0, task_type="CAUSAL_LM",
        layers_to_transform=None if options.work == "main" else [options.layers - 2, options.layers - 1],
    )  # fmt: skip


def plain_arguments(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What the stock trainers are told."""
    return {
        "output_dir": folder,
        "max_steps": num_steps(options) * WORKS[options.work][0],
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }


def run_trainer(
    name: str, model: Any, tokenizer: Any, rows: list[Any], clock: StepClock, options: argparse.Namespace
) -> list[float]:
    """The plain Trainer with peft, as people write it."""
    import torch
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from peftlab.batches import Collator, Row

    collator = Collator(tokenizer.pad_token_id, "causal")

    def padded(batch: list[Row]) -> dict[str, torch.Tensor]:
        made = collator(batch)
        if name == "trainer_dynamic":
            return made
        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        return {
            key: torch.nn.functional.pad(value, (0, LONGEST - value.shape[1]), value=fill[key])
            for key, value in made.items()
        }

    torch.manual_seed(0)
    adapted = attach(model, options).model if options.work == "new_layer" else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            adapted or start_alike(get_peft_model(model, lora_config(options))),
            TrainingArguments(remove_unused_columns=False, **plain_arguments(options, folder)),
            train_dataset=rows,
            data_collator=padded,
            callbacks=[clock.callback()],
        )
        trainer.train()
    return logged(trainer)


def run_trl(
    name: str, model: Any, tokenizer: Any, rows: list[Any], clock: StepClock, options: argparse.Namespace
) -> list[float]:
    """TRL's SFTTrainer on rows of tokens, losses on answers alone."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    best = {"gradient_checkpointing": False, "bf16": False} if name == "trl_best" else {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(max_length=LONGEST, **best, **plain_arguments(options, folder)),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora_config(options),
            callbacks=[clock.callback()],
        )
        start_alike(trainer.model)
        trainer.train()
    return logged(trainer)


def run_peftlab(
    name: str, model: Any, tokenizer: Any, rows: list[Any], clock: StepClock, options: argparse.Namespace
) -> list[float]:
    """The trainer of peftlab as a run has it, proof of training, probes and all."""
    attached = attach(model, options)
    start_alike(attached.model)
    steps = num_steps(options) * WORKS[options.work][0]
    kept = 0 if name == "peftlab_uncached" else 4 * 10**9
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_lab_trainer(
            attached, tokenizer, rows, Path(folder), clock, steps=steps, batch_size=options.batch_size, trunk_bytes=kept
        )  # fmt: skip
        trainer.train()
    return logged(trainer)


def attach(model: Any, options: argparse.Namespace) -> Any:
    """The adapter of the work, as peftlab attaches it."""
    from peftlab.catalog import METHODS
    from peftlab.mapping import map_model

    leaf = METHODS.load("new_layer" if options.work == "new_layer" else "lora")
    settings = leaf.Settings()
    if options.work != "new_layer":
        layers = None if options.work == "main" else (options.layers - 2, options.layers - 1)
        settings = leaf.Settings(rank=RANK, alpha=ALPHA, targets="both", dropout=0.0, layers=layers)
    return leaf.attach(model, map_model(model), settings, head="causal", seed=0)


def machine_limit(options: argparse.Namespace) -> dict[str, float]:
    """Useful tokens per second if a step were its products alone, at the speed of the fastest product."""
    import torch

    rows, tokenizer = make_rows(options)
    with torch.device("meta"):
        model = make_model(tokenizer, options)
    blocks = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    head = len(tokenizer) * options.hidden
    tokens = sum(len(row.input_ids) for row in rows)
    labelled = sum(label != -100 for row in rows for label in row.labels)
    flops = 4 * (blocks * tokens + head * labelled) / tokens
    steps = num_steps(options)
    shapes = products(
        tokens=tokens // steps, labelled=labelled // steps, hidden=options.hidden, vocabulary=len(tokenizer)
    )
    found: dict[str, float] = {"flops_per_token": flops}
    for dtype, speeds in product_speeds(shapes, torch.device("cpu"), turns=3).items():
        found[f"{dtype}_gflops"] = speeds["best"]
        found[f"{dtype}_tokens_per_second"] = speeds["best"] * 1e9 / flops
    return found


def render(repeats: list[dict[str, Any]], names: list[str], work: str) -> str:
    """The table; losses that differ from the first contender's end it."""
    own, first = "peftlab" if "peftlab" in names else names[0], names[0]
    lines = ["| | tokens/s | peftlab is | peak MiB | last loss |", "|---|---:|---:|---:|---:|"]
    for name in names:
        far = max(
            abs(a - b) / abs(a)
            for repeat in repeats
            for a, b in zip(repeat[first]["losses"], repeat[name]["losses"], strict=True)
        )
        if far > (SAME_HALF if name in HALF else SAME):
            raise SystemExit(f"{name} has losses that differ by {far:.2%} from those of {first}")
        speed, peak = (median_of(repeats, name, f) for f in ("tokens_per_second", "peak_memory_bytes"))
        lines.append(
            f"| {CONTENDERS[name]} | {speed:.0f} | {median_ratio(repeats, own, name, 'tokens_per_second'):.2f} x |"
            f" {peak / 2**20:.0f} | {repeats[-1][name]['losses'][-1]:.4f} |"
        )
    for dtype in ("float32", "bfloat16"):
        gflops, best = (median_of(repeats, "limits", f"{dtype}_{f}") for f in ("gflops", "tokens_per_second"))
        lines.append(f"\nproducts alone, {dtype}: {gflops:.0f} GFLOP/s, {best:.0f} tokens/s")
    if work == "main" and own == "peftlab":
        share = statistics.median(
            repeat[own]["tokens_per_second"] / repeat["limits"]["bfloat16_tokens_per_second"]
            for repeat in repeats
        )
        lines[-1] += f", of which peftlab reaches {share:.0%}"
    lines.append(f"\n{len(repeats)} repeats; medians, of ratios within a repeat too")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
