"""METEOR's two programs, their place taken by a script that speaks as they do: what is told them and what is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peftlab import meteor_jar
from peftlab.errors import EvaluationError
from peftlab.metrics import meteor
from peftlab.task import Example

JAVA = """#!{python}
import sys
if "-cp" in sys.argv:  # the tokenizer
    sys.stdout.write(sys.stdin.read().lower().replace(".", " ."))
    raise SystemExit
for line in sys.stdin:
    kind, *parts = line.strip("\\n").split(" ||| ")
    if kind == "SCORE":
        *references, answer = (part.split() for part in parts)
        best = max(references, key=lambda words: len(set(words) & set(answer)))
        hits = len(set(best) & set(answer))
        print(len(answer), len(best), *[0] * 18, 1, hits, hits, flush=True)
    else:
        numbers = [float(number) for number in parts[0].split()]
        print(numbers[21] / numbers[1], numbers[21] / numbers[1], sep="\\n", flush=True)
    if "crash" in line:
        sys.stderr.write("out of memory")
        raise SystemExit(1)
"""


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named java that comes first."""
    program = tmp_path / "java"
    program.write_text(JAVA.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for module in (meteor_jar, meteor):
        monkeypatch.setattr(module, "find_jars", lambda: (tmp_path / "meteor.jar", tmp_path / "words.jar"))
    return program


def test_answers_and_all_references_reach_the_program_in_words(java: Path) -> None:
    examples = [Example("a", "s", ("A pub\nby the river.", "Cheap.")), Example("b", "s", ("an old ||| pub",))]
    found = meteor.score(["a pub by the river", "an old bar"], examples, seed=1)
    assert found.value == pytest.approx(100 * (5 + 2) / (5 + 3))
    assert found.interval == pytest.approx((100 * 4 / 6, 100.0))
    assert (found.count, found.rows) == (2, None)


def test_a_program_that_ends_is_an_error_with_its_own_words(java: Path) -> None:
    with meteor_jar.MeteorProgram() as program:
        program.statistics("crash", ["a"])
        with pytest.raises(EvaluationError, match=r"METEOR ended: out of memory"):
            program.value([1.0] * 23)
    with pytest.raises(EvaluationError, match=r"use it in a with statement"):
        meteor_jar.MeteorProgram().statistics("a", ["a"])


def test_a_tokenizer_that_loses_a_line_is_an_error(java: Path) -> None:
    java.write_text(f"#!{sys.executable}\nprint('one')\n")
    with pytest.raises(EvaluationError, match=r"gave 1 lines for 2 texts"):
        meteor_jar.split_by_stanford(["one", "two"])
