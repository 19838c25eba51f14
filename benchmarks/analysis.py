"""The multi-model document's figures for speed and memory, each beside what is measured here.

    python benchmarks/analysis.py --output analysis.json

The models have the document's shapes and random weights: what is timed does not depend on their values. Each runs in a
process of its own, through `MultiModelAnalyzer` as the document's snippets do: load, activations and attention of layers 0,
6 and 11 for two texts, checkpointing measured on a training step, unload. A claim holds, or it does not; where the document
leaves open what was measured, the row says what it is held against.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ("gpt2", "gpt-neo-125M", "bert-base-uncased")
LAYERS = [0, 6, 11]
WORDS = 64
"""Words of each of the two texts."""
CLAIMS: dict[str, dict[str, tuple[str, float]]] = {
    "gpt2": {
        "activation_seconds": ("under 2 s", 2.0),
        "peak_gb": ("1.5 GB", 1.5),
        "training_saved_of_all": ("20-40 % less memory by gradient checkpointing", 0.2),
        "inference_saved": ("the same, while only looking", 0.2),
        "reclaimed": ("more than 90 % reclaimed after unloading", 0.9),
        "reclaimed_again": ("the same of a second loading, when all libraries are there: 95 %", 0.95),
    },
    "gpt-neo-125M": {"activation_seconds": ("about 1 s", 1.0), "peak_gb": ("1.0 GB", 1.0)},
    "bert-base-uncased": {"activation_seconds": ("under 1.5 s", 1.5), "peak_gb": ("1.5 GB", 1.5)},
}
"""Shape to figure to the document's words and the number that it is held against."""
AT_LEAST = ("training_saved_of_all", "inference_saved", "reclaimed", "reclaimed_again")
"""Figures that are to be large; the others are to be small."""


def main() -> None:
    """Measure every shape in a process of its own, print a table, write JSON where asked."""
    options = read_options()
    if options.shape:
        print("RESULT" + json.dumps(measure(options.shape, options)))
        return
    from peftlab.devices import describe_environment

    results = {shape: run_alone(shape, options) for shape in SHAPES}
    rows = [
        {"shape": shape, "figure": figure, "claim": words, "measured": results[shape][figure], "holds": holds}
        for shape, claims in CLAIMS.items()
        for figure, (words, bound) in claims.items()
        for holds in [judge(figure, results[shape][figure], bound)]
    ]
    for row in rows:
        verdict = {True: "holds", False: "does not hold", None: "not measured here"}[row["holds"]]
        value = "-" if row["measured"] is None else f"{row['measured']:.3f}"
        print(f"{row['shape']:18}  {row['figure']:22}  {value:>8}  {verdict:17}  {row['claim']}")
    if options.output:
        record = {
            "options": {key: str(value) for key, value in vars(options).items()},
            "rows": rows,
            "all": results,
            "environment": describe_environment(Path(__file__).parent),
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="measure this one here, print JSON")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def run_alone(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape in a fresh process."""
    command = [sys.executable, __file__, "--shape", shape, "--device", options.device]
    command += ["--threads", str(options.threads)] if options.threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shape} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT")[2])
    return result


def judge(figure: str, measured: float | None, bound: float) -> bool | None:
    """Whether a claim holds; None where nothing was measured."""
    if measured is None:
        return None
    return measured >= bound if figure in AT_LEAST else measured <= bound


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one shape."""
    import torch

    from peftlab import MultiModelAnalyzer, UniversalModelRegistry
    from peftlab.devices import peak_memory, report_memory
    from peftlab.model_cache import give_memory_back

    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="analysis_") as folder:
        subprocess.run([sys.executable, "-c", _SAVE, shape, folder], check=True)
        registry = UniversalModelRegistry()
        registry.get_model_config(folder)  # proves the map, so that this is not counted to loading
        analyzer = MultiModelAnalyzer(registry)
        give_memory_back()
        before = report_memory().process_bytes
        adapter, load_seconds = timed(lambda: analyzer.load_model(folder, device=options.device))
        texts = [" ".join(f"w{(i * 7 + row) % 1000 + 5}" for i in range(WORDS)) for row in range(2)]
        _, first_seconds = timed(lambda: analyzer.extract_activations(folder, texts, LAYERS))
        found, seconds = timed(lambda: analyzer.extract_activations(folder, texts, LAYERS))
        _, attention_seconds = timed(lambda: analyzer.get_attention_patterns(folder, texts, LAYERS))
        peaks = peak_memory()
        used = peaks["device"] if adapter.model.device.type == "cuda" else (peaks["host"] or 0) - before
        usage = analyzer.get_memory_usage()
        saved = analyzer.optimize_memory(folder, [" ".join(texts)] * 2)
        weights = usage["models_gb"] * 2**30
        result = {
            "parameters": adapter.config.num_parameters,
            "device": str(adapter.model.device),
            "threads": torch.get_num_threads(),
            "load_seconds": load_seconds,
            "activation_seconds": first_seconds,
            "activation_seconds_again": seconds,
            "attention_seconds": attention_seconds,
            "tokens": len(found.rows),
            "activation_values": sum(values.numel() for values in found.values()),
            "weights_gb": usage["models_gb"],
            "peak_gb": (used or 0) / 2**30,
            "inference_saved": saved.inference_saved,
            "training_saved_above_weights": saved.training_saved,
            "training_saved_of_all": share(weights, saved.training_bytes, saved.training_bytes_checkpointed),
        }
        died, of_all, after = unload(analyzer, adapter, folder, before)
        del adapter
        adapter = analyzer.load_model(folder, device=options.device)
        analyzer.extract_activations(folder, texts, LAYERS)
        died_again, of_loading, _ = unload(analyzer, adapter, folder, after)
        return result | {"died": died and died_again, "reclaimed": of_all, "reclaimed_again": of_loading}


def unload(analyzer: Any, adapter: Any, name: str, before: int) -> tuple[bool, float, int]:
    """Whether the model died, the share given back of what the process grew by since `before`, and what it holds now."""
    from peftlab.devices import report_memory
    from peftlab.model_cache import give_memory_back

    sum(float(p.sum()) for p in adapter.model.parameters())  # mapped from the file: the rest is read only now
    give_memory_back()
    full = report_memory().process_bytes
    report = analyzer.unload_model(name)
    return report.died, (full - report.after_bytes) / (full - before), report.after_bytes


def share(weights: float, without: int | None, with_it: int | None) -> float | None:
    """What checkpointing saves of weights and peak together."""
    if without is None or with_it is None:
        return None
    return 1 - (weights + with_it) / (weights + without)


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action gives, and its seconds."""
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


_SAVE = """
import sys
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers
shape, folder = sys.argv[1:]
config = {
    "gpt2": T.GPT2Config, "gpt-neo-125M": T.GPTNeoConfig, "bert-base-uncased": T.BertConfig,
}[shape]()
if shape == "gpt-neo-125M":
    config = T.GPTNeoConfig(
        hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072, attention_types=[[["global", "local"], 6]]
    )
model = {
    "gpt2": T.GPT2LMHeadModel, "gpt-neo-125M": T.GPTNeoForCausalLM, "bert-base-uncased": T.BertForMaskedLM,
}[shape](config)
model.save_pretrained(folder)
special = ["<unk>", "<pad>", "<s>"]
words = special + [f"w{i}" for i in range(3, config.vocab_size)]
made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
T.PreTrainedTokenizerFast(
    tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="<s>"
).save_pretrained(folder)
"""
"""Saves a model of a shape with random weights; in a process of its own, so that its memory is not counted."""


if __name__ == "__main__":
    main()
