"""Code generation: a sentence that describes a function, to be written as the function in Python, Java or JavaScript.

The rows are those of `code_summarization`, read the other way round:

```
source      Twice a number .
reference   def twice(x):
                return 2 * x
```

The reference is the function's own source text, line breaks kept. A Python function's docstring, which would repeat the
source, is taken out of it by Python's own parser. Left out and counted are rows that have no source text (tokens alone)
or tokens that are masked, and Python that the parser does not take. The language is `task.settings.language`.

Source: github.com/github/CodeSearchNet, Husain et al. 2019, "CodeSearchNet Challenge" (arXiv:1909.09436), in the split of
github.com/microsoft/CodeXGLUE, Lu et al. 2021, "CodeXGLUE" (arXiv:2102.04664). Please cite both.
No checksum is published; a run folder records those of the files it read.
Licence: each function has that of its repository; CodeXGLUE's data are under C-UDA.
"""

from __future__ import annotations

from pathlib import Path

from peftlab.code_rows import HUB_FILES as HUB_FILES
from peftlab.code_rows import MASK, CodeSettings, Function, load_functions
from peftlab.task import Splits

PROMPT = "description: {source}\ncode:\n"
METRICS = ("bleu", "exact_match", "edit_distance", "syntax_valid", "ast_similarity", "code_bleu_no_dataflow")
MAX_NEW_TOKENS = 256

Settings = CodeSettings


def load(data_dir: Path | None, *, seed: int, settings: CodeSettings | None = None) -> Splits:
    """Read one language's functions.

    Args:
        data_dir: The folder that holds a folder for each language, or one language's files.
        seed: Has no effect: the splits are the published ones, and validation is always the same part of train.
        settings: The language; Python where None.

    Returns:
        The splits. `notes` tell of row counts other than the published ones, duplicates, rows left out, how validation
        was made, and of functions dropped because their code or description stands in two splits.

    Raises:
        DataError: No folder was given, it lacks a split, or a row is malformed.
    """
    return load_functions(
        data_dir,
        settings or CodeSettings(),
        _example,
        task="code_generation",
        left_out="without a source text that can be told from its documentation",
    )


def _example(function: Function) -> tuple[str, str] | None:
    """What is read and what is to be written."""
    if function.code is None or not function.code.strip() or MASK in function.tokens.split():
        return None
    return function.description, function.code.strip()
