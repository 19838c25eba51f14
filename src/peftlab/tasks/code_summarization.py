"""Code summarization: a function in Python, Java or JavaScript, to be described in one sentence.

A row of the files is a function and the first paragraph of its documentation, both also as tokens:

```
{"repo": "o/r", "path": "a.py", "func_name": "twice", "language": "python", "code": "def twice(x): ...",
 "code_tokens": ["def", "twice", "(", "x", ")", ":", "return", "2", "*", "x"], "docstring": "Twice a number.",
 "docstring_tokens": ["Twice", "a", "number", "."]}
```

As in CodeXGLUE, the model reads the code's tokens with a space between - `code` itself holds the docstring, which is the
answer - and the reference is the docstring's tokens with a space between. Where the files lie is said in
`peftlab.code_rows`; the language is `task.settings.language`. By hub name: `google/code_x_glue_ct_code_to_text:python`.

Source: github.com/github/CodeSearchNet, Husain et al. 2019, "CodeSearchNet Challenge" (arXiv:1909.09436);
github.com/microsoft/CodeXGLUE, Lu et al. 2021, "CodeXGLUE" (arXiv:2102.04664), whose cleaning and split this is: 251,820 /
13,914 / 14,918 functions in Python, 164,923 / 5,183 / 10,955 in Java, 58,025 / 3,885 / 3,291 in JavaScript. Please cite
both papers.
No checksum is published; a run folder records those of the files it read.
Licence: each function has that of its repository; CodeXGLUE's data are under C-UDA.
"""

from __future__ import annotations

from pathlib import Path

from peftlab.code_rows import HUB_FILES as HUB_FILES
from peftlab.code_rows import CodeSettings, Function, load_functions
from peftlab.task import Splits

PROMPT = "code:\n{source}\nsummary:"
METRICS = ("smoothed_bleu_4", "rouge_l")
MAX_NEW_TOKENS = 64

Settings = CodeSettings


def load(data_dir: Path | None, *, seed: int, settings: CodeSettings | None = None) -> Splits:
    """Read one language's functions.

    Args:
        data_dir: The folder that holds a folder for each language, or one language's files.
        seed: Has no effect: the splits are the published ones, and validation is always the same part of train.
        settings: The language; Python where None.

    Returns:
        The splits. `notes` tell of row counts other than the published ones, duplicates, how validation was made, and of
        functions dropped because their code or description stands in two splits.

    Raises:
        DataError: No folder was given, it lacks a split, or a row is malformed.
    """
    return load_functions(
        data_dir,
        settings or CodeSettings(),
        _example,
        task="code_summarization",
        left_out="nothing to say",
    )


def _example(function: Function) -> tuple[str, str]:
    """What is read and what is to be written."""
    return function.tokens, function.description
