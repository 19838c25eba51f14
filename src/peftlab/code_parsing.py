"""Code as a syntax tree: tree-sitter's parsers for Python, Java and JavaScript, and what the code metrics read there.

tree-sitter reads on behind a fault, so that a tree is there for wrong code too; `is_valid` says whether there was one.
A function or method alone, as CodeSearchNet has them, is read as such.
"""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from peftlab.errors import NotComputedError
from peftlab.task import Example

LANGUAGES = ("python", "java", "javascript")
INSTALL = "pip install 'peftlab[metrics]'"

_DECISIONS = {
    "python": {
        "if_statement", "elif_clause", "for_statement", "while_statement", "except_clause", "conditional_expression",
        "boolean_operator", "if_clause", "for_in_clause",
    },
    "java": {
        "if_statement", "for_statement", "enhanced_for_statement", "while_statement", "do_statement", "catch_clause",
        "ternary_expression",
    },
    "javascript": {
        "if_statement", "for_statement", "for_in_statement", "while_statement", "do_statement", "catch_clause",
        "ternary_expression", "switch_case",
    },
}  # fmt: skip
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_SHORT_CIRCUITS = {"&&", "||", "??"}


@dataclass(frozen=True, slots=True)
class Code:
    """A text read as code.

    Attributes:
        language: One of `LANGUAGES`.
        root: The root of tree-sitter's tree.
        is_valid: Whether the whole text is code of that language.
    """

    language: str
    root: Any
    is_valid: bool


@cache
def _parser(language: str) -> Any:
    """tree-sitter's parser of a language."""
    try:
        tree_sitter = importlib.import_module("tree_sitter")
        grammar = importlib.import_module(f"tree_sitter_{language}")
    except ImportError as error:
        raise NotComputedError(f"reading {language} needs {error.name}; install with: {INSTALL}") from error
    return tree_sitter.Parser(tree_sitter.Language(grammar.language()))


def read_code(text: str, language: str) -> Code:
    r"""Read a text as code.

    Args:
        text: A file, a function or a method.
        language: One of `LANGUAGES`.

    Returns:
        Its tree. Indentation that all lines share is left out; a Java or JavaScript method is read inside a class where
        it is none of the language by itself. Valid is what has no fault in tree-sitter's tree, and in Python also none
        for Python's own parser (which knows this Python's syntax alone: `print "a"` is a fault).

    Raises:
        NotComputedError: tree-sitter or the language's grammar is not installed.

    Example:
        >>> read_code("def f(x):\n    return x", "python").is_valid
        True
        >>> read_code("def f(x:", "python").is_valid
        False
    """
    parser = _parser(language)
    plain = textwrap.dedent(text)
    root = parser.parse(plain.encode("utf-8", errors="replace")).root_node
    if not root.has_error:
        return Code(language, root, bool(plain.strip()) and (language != "python" or _is_python(plain)))
    if language != "python":
        inside = parser.parse(f"class A {{\n{plain}\n}}".encode("utf-8", errors="replace")).root_node
        if not inside.has_error and inside.named_child_count == 1:
            return Code(language, inside.named_children[0].child_by_field_name("body"), True)
    return Code(language, root, False)


def read_answer(text: str, language: str) -> Code:
    r"""Read a model's answer as code, without the fence that chat models put around it.

    Args:
        text: The answer; where it holds a fence (three backticks), what the first one holds is the code.
        language: One of `LANGUAGES`.

    Returns:
        The code, as of `read_code`.

    Raises:
        NotComputedError: tree-sitter or the language's grammar is not installed.

    Example:
        >>> read_answer("Here:\n```python\nreturn 1\n```", "python").is_valid
        True
    """
    fenced = _FENCE.search(text)
    return read_code(fenced.group(1) if fenced else text, language)


def _is_python(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape sequence in somebody else's code
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def language_of(examples: Sequence[Example]) -> str:
    """The language of the references: the one in which most of them are valid.

    Args:
        examples: Examples whose references are code of one language.

    Returns:
        One of `LANGUAGES`.

    Raises:
        NotComputedError: Less than half of the references are valid in any, or tree-sitter or a grammar is not installed.

    Example:
        >>> language_of([Example("test-0", "s", ("int f() { return 1; }",))])
        'java'
    """
    texts = [reference for example in examples for reference in example.references]
    valid = {language: sum(read_code(text, language).is_valid for text in texts) for language in LANGUAGES}
    best = max(LANGUAGES, key=lambda language: valid[language])
    if 2 * valid[best] < len(texts):
        told = ", ".join(f"{count} as {language}" for language, count in valid.items())
        raise NotComputedError(
            f"the references are no code that can be read: of {len(texts)} are valid {told}; "
            "code metrics are for tasks whose answers are Python, Java or JavaScript"
        )
    return best


def nodes(code: Code) -> Iterator[Any]:
    """All nodes of a tree, a parent before its children.

    Args:
        code: The code.

    Yields:
        tree-sitter's nodes.
    """
    waiting = [code.root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(node.children))


def tokens(code: Code) -> list[tuple[str, bool]]:
    """The leaves of a tree in their order, without comments.

    Args:
        code: The code.

    Returns:
        Text and whether it is a keyword of the language.

    Example:
        >>> tokens(read_code("return x", "python"))
        [('return', True), ('x', False)]
    """
    found = []
    for node in nodes(code):
        if not node.child_count and "comment" not in node.type and node.text:
            text = node.text.decode("utf-8", errors="replace").strip()
            if text:
                found.append((text, not node.is_named and text.isalpha()))
    return found


def shapes(code: Code) -> Counter[tuple[str, ...]]:
    """What the tree is made of: each inner node's kind with its children's kinds, names and values left out.

    Args:
        code: The code.

    Returns:
        Counts by shape.
    """
    return Counter(
        (node.type, *(child.type for child in node.children)) for node in nodes(code) if node.child_count
    )


def subtrees(code: Code) -> list[str]:
    """All subtrees with more than a leaf, kinds alone, written as S-expressions.

    Args:
        code: The code.

    Returns:
        One text for each.
    """
    return [str(node) for node in nodes(code) if node.child_count]


def complexity(code: Code) -> int:
    r"""McCabe's cyclomatic complexity: 1, and 1 for each decision.

    Decisions are if, elif, for, while, do, except or catch, the conditional expression, each `and`, `or`, `&&`, `||`,
    `??`, each `if` and `for` of a comprehension, and each case of a switch or match but the default.

    Args:
        code: The code; of several functions the decisions are added up.

    Returns:
        The number, 1 or more.

    Example:
        >>> complexity(read_code("def f(a, b):\n    if a and b:\n        return 1", "python"))
        3

    Source: McCabe 1976, section 2.
    """
    return 1 + sum(_decides(node, code.language) for node in nodes(code))


def _decides(node: Any, language: str) -> bool:
    """Whether a node is a decision."""
    if node.type == "case_clause":
        return not _is_wildcard(node)
    if node.type == "switch_label":
        return bool(node.children) and node.children[0].type == "case"
    return node.type in _DECISIONS[language] or (node.type in _SHORT_CIRCUITS and not node.child_count)


def _is_wildcard(node: Any) -> bool:
    patterns = [child.text for child in node.named_children if child.type == "case_pattern"]
    return patterns == [b"_"]
