"""METEOR 1.5 and Stanford's tokenizer, the Java programs that the E2E challenge and COCO score with.

Both come as jars in the package pycocoevalcap; of its Python code nothing is used. Where Java or the package is not
there, the score is not computed, and the message has the line that installs them.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from peftlab.errors import EvaluationError, NotComputedError

INSTALL = "apt-get install default-jre-headless && pip install --no-deps pycocoevalcap==1.2"
TOKENIZER = "edu.stanford.nlp.process.PTBTokenizer"
_DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)  # pycocoevalcap/tokenizer/ptbtokenizer.py; the brackets come in lower case and so stay, there as here
_CHUNKS, _TEST_MATCHES, _REFERENCE_MATCHES = 20, 21, 22


def find_jars() -> tuple[Path, Path]:
    """The two jars.

    Returns:
        METEOR's and the tokenizer's.

    Raises:
        NotComputedError: Java or the package is not installed; says how to install them.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    folders = list(package.submodule_search_locations or ()) if package else []
    jars = [
        (
            Path(folder) / "meteor" / "meteor-1.5.jar",
            Path(folder) / "tokenizer" / "stanford-corenlp-3.4.1.jar",
        )
        for folder in folders
    ]
    found = next((pair for pair in jars if all(jar.is_file() for jar in pair)), None)
    lacking = [
        name for name, is_there in (("Java", shutil.which("java")), ("pycocoevalcap", found)) if not is_there
    ]
    if found is None or lacking:
        raise NotComputedError(f"METEOR 1.5 needs {' and '.join(lacking)}; install with: {INSTALL}")
    return found


def split_by_stanford(texts: Sequence[str]) -> list[str]:
    """Texts as words with a space between, by Stanford's PTB tokenizer in Java.

    Args:
        texts: Texts; line breaks within one count as spaces.

    Returns:
        Lower-cased words without punctuation, one line for each text.

    Raises:
        NotComputedError: Java or the package is not installed.
        EvaluationError: The program failed.
    """
    _, jar = find_jars()
    command = ["java", "-cp", str(jar), TOKENIZER, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    made = done.stdout.decode("utf-8", errors="replace").split("\n")[:-1]
    if done.returncode or len(made) != len(texts):
        told = done.stderr.decode("utf-8", errors="replace")[-500:]
        raise EvaluationError(
            f"Stanford's tokenizer gave {len(made)} lines for {len(texts)} texts (exit {done.returncode}): {told}"
        )
    return [" ".join(word for word in line.split(" ") if word not in _DROPPED) for line in made]


class MeteorProgram:
    """METEOR 1.5 running, for English, with the options of the E2E challenge; a context manager.

    It reads its table of paraphrases once (some seconds, up to 2 GB of memory), so one is kept for all texts.

    Raises:
        NotComputedError: Java or the package is not installed.
    """

    def __init__(self) -> None:
        self.jar, _ = find_jars()
        self._errors: IO[bytes] | None = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> MeteorProgram:
        """Start the program."""
        self._errors = tempfile.TemporaryFile()
        options = ["-", "-", "-stdio", "-l", "en", "-norm"]
        self._process = subprocess.Popen(
            ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(self.jar), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the program."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self._errors is not None:
            self._errors.close()

    def statistics(self, prediction: str, references: Sequence[str]) -> list[float]:
        """What METEOR counts of one example.

        Args:
            prediction: The answer, its words with a space between.
            references: The accepted answers, the same way.

        Returns:
            The 23 numbers of the program's own line; those of the best reference.
        """
        parts = [text.replace("|||", " ") for text in (*references, prediction)]
        self._tell(f"SCORE ||| {' ||| '.join(parts)}")
        return [float(number) for number in self._hear().split()]

    def value(self, statistics: Sequence[float]) -> float:
        """METEOR of counts.

        Args:
            statistics: As of `statistics`, of one example or summed by `summable`.

        Returns:
            The score in 0-1.
        """
        self._tell("EVAL ||| " + " ".join(str(float(number)) for number in statistics))
        value = float(self._hear())
        self._hear()  # the same again, as the score of all that was given
        return value

    def _tell(self, line: str) -> None:
        stream = self._process.stdin if self._process else None
        if stream is None:
            raise EvaluationError("METEOR is not running; use it in a with statement")
        try:
            stream.write(line + "\n")
            stream.flush()
        except OSError as error:
            raise EvaluationError(f"METEOR ended: {self._told()}") from error

    def _hear(self) -> str:
        line = self._process.stdout.readline() if self._process and self._process.stdout else ""
        if not line:
            raise EvaluationError(f"METEOR ended: {self._told()}")
        return line.strip()

    def _told(self) -> str:
        """The end of what the program wrote about its fault."""
        if self._errors is None:
            return "it gave no reason"
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", errors="replace")[-500:].strip() or "it gave no reason"


def summable(statistics: Sequence[float]) -> list[float]:
    """Counts of one example as the program adds them up: an answer equal to its reference has no break in order.

    Args:
        statistics: The 23 numbers of `MeteorProgram.statistics`: lengths first, then matches by kind, chunks, and how
            many words of answer and reference matched.

    Returns:
        The numbers to sum over examples.

    Example:
        >>> summable([3.0, 3.0, *[0.0] * 18, 1.0, 3.0, 3.0])[20]
        0.0
    """
    numbers = list(statistics)
    whole = numbers[0] == numbers[_TEST_MATCHES] and numbers[1] == numbers[_REFERENCE_MATCHES]
    if whole and numbers[_CHUNKS] == 1:
        numbers[_CHUNKS] = 0.0
    return numbers
