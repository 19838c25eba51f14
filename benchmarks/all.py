"""Every benchmark, one after the other, into one page with machine, versions and commit.

    python benchmarks/all.py --short     a short form
    python benchmarks/all.py             all of it

Each benchmark measures peers and peftlab in one run on the same work and ends with an error where their losses or answers
differ. Peers are measured where they are installed: `pip install trl nnsight transformer_lens`, or --trl_python for TRL in
an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHORT: dict[str, list[str]] = {
    "training.py": ["--steps", "2", "--repeats", "1"],
    "training.py --work top2": ["--steps", "6", "--repeats", "1"],
    "training.py --work new_layer": ["--steps", "4", "--repeats", "1"],
    "memory_prediction.py": ["--families", "llama", "--lengths", "128", "--no_processes"],
    "extraction.py": ["--layers", "4", "--texts", "64"],
}
FULL: dict[str, list[str]] = {
    "training.py": [],
    "training.py --work top2": ["--steps", "12"],
    "training.py --work new_layer": ["--steps", "8"],
    "generation.py": [],
    "memory_prediction.py": [],
    "extraction.py": [],
    "analysis.py": [],
}


def main() -> None:
    """Run them and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--trl_python", help="the python of another environment, with TRL")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.md"))
    options = parser.parse_args()
    own = [
        f"--{name}={getattr(options, name)}"
        for name in ("data_dir", "tokenizer", "trl_python")
        if getattr(options, name) is not None
    ]
    parts = [f"# Benchmarks\n\n```json\n{json.dumps(describe(), indent=2)}\n```"]
    failed = []
    for name, more in (SHORT if options.short else FULL).items():
        file, *fixed = name.split()
        given = {"training.py": own, "generation.py": [o for o in own if "trl" not in o]}.get(file, [])
        command = [*fixed, *more, *given]
        print(f"{file} {' '.join(command)}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(HERE / file), *command], capture_output=True, text=True, check=False
        )
        told = done.stdout if done.returncode == 0 else f"failed: {done.stderr[-2000:]}"
        failed += [name] if done.returncode else []
        seconds = time.perf_counter() - began
        parts.append(f"## {file} {' '.join([*fixed, *more])}\n\n{told.strip()}\n\n{seconds:.0f} s")
        options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts[1:]))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def describe() -> dict[str, Any]:
    """Machine, versions and commit."""
    from peftlab.devices import describe_environment

    return describe_environment(HERE)


if __name__ == "__main__":
    main()
