"""Every benchmark, one after the other, into one page with machine, versions, commit and peers.

    python benchmarks/all.py --short     a short form, under twenty minutes on two cores
    python benchmarks/all.py             all of it, under two hours

Each benchmark measures peers and peftlab in one run on the same work and ends with an error where their losses or answers
differ. Peers are measured where they are installed: `pip install "peftlab[bench]"`, or --trl_python for TRL in an
environment of its own. The page is written anew after each, the drawings lie beside it.
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
PEERS = ("transformers", "trl", "nnsight", "transformer_lens", "accelerate")
SHORT: dict[str, list[str]] = {
    "limits.py": [],
    "start.py": ["--repeats", "2"],
    "training.py": ["--steps", "2", "--repeats", "1"],
    "training.py --work top2": ["--steps", "6", "--repeats", "1"],
    "training.py --work new_layer": ["--steps", "6", "--repeats", "1", "--only", "trainer_padded", "peftlab"],
    "joint.py": ["--short", "--steps", "4"],
    "generation.py": ["--prompts", "24", "--repeats", "1"],
    "probes.py": ["--steps", "8"],
    "loss_curve.py": ["--base", "embedded", "--steps", "60"],
    "scaling.py": ["--short", "--steps", "2"],
    "memory_prediction.py": ["--families", "llama", "--lengths", "128", "--no_processes"],
    "extraction.py": ["--layers", "4", "--texts", "64"],
}
"""Of the trunk's works an epoch has at least six steps: of fewer rows it would keep nothing, and rightly."""
FULL: dict[str, list[str]] = {
    "limits.py": [],
    "start.py": [],
    "training.py": [],
    "training.py --work top2": ["--steps", "6"],
    "training.py --work new_layer": ["--steps", "6", "--repeats", "3"],
    "joint.py": [],
    "generation.py": [],
    "probes.py": [],
    "probes.py --method adalora": [],
    "loss_curve.py": [],
    "loss_curve.py --base embedded": [],
    "scaling.py": [],
    "memory_prediction.py": [],
    "extraction.py": [],
    "analysis.py": [],
}
DRAWN = ("loss_curve.py", "scaling.py")
"""Those that draw."""
TAKES: dict[str, tuple[str, ...]] = {
    "start.py": ("trl_python",),
    "training.py": ("data_dir", "tokenizer", "trl_python"),
    "joint.py": ("data_dir", "tokenizer"),
    "generation.py": ("data_dir", "tokenizer"),
    "probes.py": ("data_dir", "tokenizer"),
    "loss_curve.py": ("data_dir", "tokenizer"),
}
"""File to the options of this command that it takes too."""


def main() -> None:
    """Run them and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="*", help="files, such as limits.py")
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--trl_python", help="the python of another environment, with TRL")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.md"))
    options = parser.parse_args()
    began = time.perf_counter()
    parts = [describe(options.trl_python)]
    failed = []
    for name, more in (SHORT if options.short else FULL).items():
        if options.only and name.split()[0] not in options.only:
            continue
        part, works = run(name, more, options)
        failed += [] if works else [name]
        parts.append(part)
        whole = f"{(time.perf_counter() - began) / 60:.1f} minutes in all"
        options.output.write_text("\n\n".join([*parts, whole]) + "\n", encoding="utf-8")
    print("\n\n".join([*parts[1:], whole]))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(name: str, more: list[str], options: argparse.Namespace) -> tuple[str, bool]:
    """One benchmark.

    Args:
        name: Its file and what always stands after it.
        more: What the form adds.
        options: The command line.

    Returns:
        Its part of the page, and whether it did not fail.
    """
    file, *fixed = name.split()
    told = [*fixed, *more]
    given = [
        f"--{key}={value}" for key in TAKES.get(file, ()) if (value := getattr(options, key)) is not None
    ]
    picture = options.output.with_name("_".join([Path(file).stem, *(w.strip("-") for w in fixed)]) + ".png")
    drawn = [f"--figure={picture}"] if file in DRAWN else []
    print(f"{file} {' '.join(told)}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / file), *told, *given, *drawn], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    part = f"## {' '.join([file, *told])}\n\n{done.stdout.strip()}"
    if done.returncode:
        part += f"\n\nfailed: {done.stderr[-2000:]}"
    elif drawn:
        part += f"\n\n![{name}]({picture.name})"
    return f"{part}\n\n{seconds:.0f} s", done.returncode == 0


def describe(trl_python: str | None) -> str:
    """The head of the page: machine, versions, commit, peers."""
    from peftlab.devices import describe_environment

    told: dict[str, Any] = describe_environment(HERE)
    told["peers"] = {peer: version_of(peer, sys.executable) for peer in PEERS}
    if trl_python:
        told["peers"]["trl"] = version_of("trl", trl_python)
    return f"# Benchmarks\n\n```json\n{json.dumps(told, indent=2)}\n```"


def version_of(package: str, python: str) -> str:
    """The version of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "not installed, left out"


if __name__ == "__main__":
    main()
