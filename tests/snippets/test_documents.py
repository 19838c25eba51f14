"""The document's snippets run, each with its smallest difference."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import COMMANDS, SNIPPETS

import task_samples
import whole_runs

HUB_NAME = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
DOCUMENT = Path(__file__).parents[3] / "shared" / "seeds" / "001_33c99bc911bf74a7.txt"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache in which the document's model is a tiny Llama."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    whole_runs.save_byte_model(repository / "snapshots" / ("0" * 40))
    return home


def environment(hub: Path) -> dict[str, str]:
    return whole_runs.environment() | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name: str, hub: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[name].runnable()],
        cwd=tmp_path, env=environment(hub), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs(name: str, hub: Path, tmp_path: Path) -> None:
    data = task_samples.write_samsum(whole_runs.write_e2e(tmp_path / "data"))
    text = (
        COMMANDS[name]
        .runnable()
        .replace("\\\n", " ")
        .replace("DATA", str(data))
        .replace("TINYLLAMA", HUB_NAME)
    )
    words = shlex.split(text)
    assert words[:2] == ["peftlab", "run"]
    small = ["--eval_samples", "2", "--batch_size", "2", "--max_length", "160", "--warmup_steps", "1"]
    small += ["--set", "evaluation.max_new_tokens=3", "--output_dir", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-m", "peftlab", *words[1:], *small],
        cwd=tmp_path, env=environment(hub) | {"PATH": ""},  # METEOR would start Java, which takes seconds
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = list((tmp_path / "runs").iterdir())
    assert (folder / "DONE").exists()


@pytest.mark.parametrize("name", [*SNIPPETS, *COMMANDS])
def test_snippet_stands_in_the_document(name: str) -> None:
    if not DOCUMENT.exists():
        pytest.skip(f"needs {DOCUMENT}, which is not part of the repository")
    text = (SNIPPETS | COMMANDS)[name].text
    document = "\n".join(
        line.rstrip() for line in DOCUMENT.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    assert "\n".join(line.rstrip() for line in text.splitlines()) in document


def test_every_difference_has_a_reason() -> None:
    for snippet in [*SNIPPETS.values(), *COMMANDS.values()]:
        assert all(reason for _, _, reason in snippet.differences)
