"""How long a person waits before anything happens: the command line's help, a plan, and a peer's import, in one run.

    python benchmarks/start.py --output start.json

Each is a process of its own, in turn, as often as --repeats says; the median counts. The peer is `from trl import
SFTTrainer`, which has read no config, tokenizer or model yet. `plan` finds everything that could be wrong with a run, for
the embedded base, and for a folder as a hub gives it: a Llama of 12 layers and 768 features. That no weights are read is
shown: in the folder they are no weights at all, but noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HELP, PEER, EMBEDDED, FOLDER = (
    "peftlab --help",
    "from trl import SFTTrainer",
    "peftlab plan, embedded base",
    "peftlab plan, a folder",
)
MOST_OF_HELP, MOST_MORE = 0.3, 3.0
"""Seconds of help, and of a plan beyond the peer's import."""
NOISE = b"no weights\n" * 1000


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trl_python", help="the python of another environment, with TRL")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="start_") as place:
        folder = make_folder(Path(place))
        peftlab = [sys.executable, "-m", "peftlab"]
        commands = {HELP: [*peftlab, "--help"]}
        if importlib.util.find_spec("trl") is not None or options.trl_python:
            commands[PEER] = [options.trl_python or sys.executable, "-c", PEER]
        commands[EMBEDDED] = [*peftlab, "plan"]
        commands[FOLDER] = [*peftlab, "plan", "--model", str(folder), "--task", "embedded"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for command in commands.values():
            took(
                command
            )  # what is computed once for a machine, such as the proof of a map, is there afterwards
        for _ in range(options.repeats):
            for name, command in commands.items():
                seconds[name].append(took(command))
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(render(medians))
    if options.output:
        from peftlab.devices import describe_environment

        record = {"seconds": seconds, "environment": describe_environment(Path(__file__).parent)}
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_folder(place: Path) -> Path:
    """A model's folder with config and tokenizer, and noise in place of its weights."""
    from transformers import LlamaConfig

    from peftlab.config import EMBEDDED_BASE
    from peftlab.model_names import SHORT_NAMES

    folder = place / "llama"
    shutil.copytree(SHORT_NAMES[EMBEDDED_BASE], folder)
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        vocab_size=own["vocab_size"], hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        **{key: own.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )  # fmt: skip
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(NOISE)
    return folder


def took(command: list[str]) -> float:
    """Seconds of a command that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds


def render(medians: dict[str, Any]) -> str:
    """The table, with what each is held against."""
    lines = ["| | seconds | at most | |", "|---|---:|---:|---|"]
    for name, seconds in medians.items():
        most = MOST_OF_HELP if name == HELP else None
        if name in (EMBEDDED, FOLDER) and PEER in medians:
            most = medians[PEER] + MOST_MORE
        bar = "" if most is None else f"{most:.2f}"
        verdict = "" if most is None else "holds" if seconds <= most else "does not hold"
        lines.append(f"| `{name}` | {seconds:.2f} | {bar} | {verdict} |")
    return "\n".join(lines) + "\n\nNo weights were read: the folder has none."


if __name__ == "__main__":
    main()
