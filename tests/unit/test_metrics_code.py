"""The metrics of code: valid syntax, trees, tokens and complexity, on texts of our own in three languages."""

from __future__ import annotations

import doctest

import pytest

from peftlab import code_parsing
from peftlab.code_parsing import complexity, language_of, read_answer, read_code, shapes, tokens
from peftlab.errors import NotComputedError
from peftlab.metrics import ast_similarity, code_bleu_no_dataflow, complexity_difference, syntax_valid
from peftlab.task import Example

CODE = {
    "python": "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result",
    "java": "int total(int[] values) { int result = 0; for (int v : values) { result += v; } return result; }",
    "javascript": "function total(values) { let result = 0; for (const v of values) { result += v; } return result; }",
}
WRONG = {
    "python": "def total(values:\n    return",
    "java": "int total(int[] values { return result; }",
    "javascript": "function total(values { return result; }",
}


def examples(language: str, count: int = 4) -> list[Example]:
    return [Example(f"test-{i}", "s", (CODE[language],)) for i in range(count)]


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(code_parsing).failed == 0


@pytest.mark.parametrize("language", code_parsing.LANGUAGES)
def test_each_language_is_known_by_its_references_and_read_by_its_parser(language: str) -> None:
    assert language_of(examples(language)) == language
    assert read_code(CODE[language], language).is_valid
    assert not read_code(WRONG[language], language).is_valid
    assert not read_code("", language).is_valid
    assert not read_code("This is no code at all.", language).is_valid


@pytest.mark.parametrize(
    ("language", "text", "is_valid"),
    [
        (
            "python",
            "    def method(self):\n        return self.x",
            True,
        ),  # indented, as a method stands in its class
        ("python", "print 'old'", False),
        ("python", "x = '\\d'", True),  # a warning of Python's is no fault
        ("python", "def f():\nreturn 1", False),
        ("python", "a" * 3 + "(" * 3000 + ")" * 3000, False),  # deeper than Python reads
        ("java", "@Override public String toString() { return name; }", True),
        ("java", "public class A { int f() { return 1; } }", True),
        ("java", "} class B {", False),  # would be code once it stood in a class
        ("javascript", "total(values) { return values.length; }", True),
        ("javascript", "} class B {", False),
        ("javascript", "const f = async (x) => { await x?.y ?? 1; };", True),
    ],
)
def test_validity(language: str, text: str, is_valid: bool) -> None:
    assert read_code(text, language).is_valid is is_valid


def test_references_that_are_no_code_are_refused() -> None:
    with pytest.raises(NotComputedError, match=r"of 1 are valid 0 as python, 0 as java, 0 as javascript"):
        language_of([Example("a", "s", ("Aromi is a cheap pub.",))])


def test_a_fence_around_an_answer_is_taken_off() -> None:
    fenced = f"Here it is:\n```java\n{CODE['java']}\n```\nDone."
    assert read_answer(fenced, "java").is_valid
    assert not read_code(fenced, "java").is_valid
    assert read_answer(f"```\n{CODE['java']}", "java").is_valid  # cut off before its end


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("python", CODE["python"], 2),
        (
            "python",
            "def f(a):\n    try:\n        return 1 if a else 2\n    except ValueError:\n        return 3",
            3,
        ),
        ("python", "x = [a for a in b if a and c or d]", 5),
        (
            "python",
            "match x:\n    case 1:\n        a()\n    case 2:\n        b()\n    case _:\n        c()",
            3,
        ),
        ("java", CODE["java"], 2),
        (
            "java",
            "int f(int a) { if (a > 0 && a < 9 || a == 5) { return 1; } else { return a > 3 ? 1 : 2; } }",
            5,
        ),
        ("java", "void f(int a) { switch (a) { case 1: g(); break; case 2: h(); default: k(); } }", 3),
        ("javascript", CODE["javascript"], 2),
        (
            "javascript",
            "function f(a) { do { a = a ?? b; } while (a); switch (a) { case 1: g(); default: h(); } }",
            4,
        ),
        ("javascript", "// if (a && b)\nfoo();", 1),
    ],
)
def test_complexity_counts_decisions(language: str, text: str, expected: int) -> None:
    assert complexity(read_code(text, language)) == expected


def test_tokens_leave_comments_out_and_know_keywords() -> None:
    found = tokens(read_code("if (a) { return b; } // if", "javascript"))
    assert [text for text, _ in found] == ["if", "(", "a", ")", "{", "return", "b", ";", "}"]
    assert [text for text, is_keyword in found if is_keyword] == ["if", "return"]


@pytest.mark.parametrize("language", code_parsing.LANGUAGES)
@pytest.mark.parametrize(
    "module", [syntax_valid, ast_similarity, code_bleu_no_dataflow, complexity_difference]
)
def test_a_perfect_answer_has_the_best_score(module: object, language: str) -> None:
    score = module.score([CODE[language]] * 4, examples(language), seed=1)  # type: ignore[attr-defined]
    assert score.value == pytest.approx({"rate": 1.0, "0-100": 100.0, "decisions": 0.0}[score.unit])
    assert score.signature.startswith(language)


def test_shares_and_their_intervals() -> None:
    predictions = [CODE["java"], WRONG["java"], CODE["java"], "no"]
    found = syntax_valid.score(predictions, examples("java"), seed=1)
    assert found.value == 0.5
    assert found.interval == (0.0, 1.0)
    assert "references valid:4/4" in found.signature
    likeness = ast_similarity.score(predictions, examples("java"), seed=1)
    assert 0.5 < likeness.value < 1  # wrong code is compared as far as it was read, and counted
    assert "not valid:2" in likeness.signature


def test_names_do_not_count_in_trees_and_structure_does() -> None:
    renamed = CODE["python"].replace("result", "r").replace("value", "v")
    assert shapes(read_code(renamed, "python")) == shapes(read_code(CODE["python"], "python"))
    one = [Example("a", "s", (CODE["python"],))]
    assert ast_similarity.score([renamed], one, seed=1).value == 1
    assert 0 < ast_similarity.score(["def total(values):\n    return sum(values)"], one, seed=1).value < 0.7
    parts = code_bleu_no_dataflow.score([renamed], one, seed=1)
    assert "syntax:100.00" in parts.signature
    assert 0 < parts.value < 90


def test_the_dice_coefficient_by_hand() -> None:
    """return a + b: return(return, binary), binary(name, +, name), module; return a: return(return, name), module."""
    one = [Example("a", "s", ("return a + b",))]
    assert ast_similarity.score(["return a"], one, seed=1).value == pytest.approx(2 * 1 / (2 + 3))


def test_code_bleu_counts_an_order_without_a_match_as_a_tenth() -> None:
    one = [Example("a", "s", ("return a",))]
    # tokens: return a against return b: 1 of 2 words, 0.1 of 1 pair; keywords: 1 of 1.2, 0.1 of 1; the tree is the same
    found = code_bleu_no_dataflow.score(["return b"], one, seed=1)
    expected = ((1 / 2 * 0.1) ** 0.5 + (1 / 1.2 * 0.1) ** 0.5 + 1) / 3
    assert found.value == pytest.approx(100 * expected)
    assert code_bleu_no_dataflow.score([""], one, seed=1).value == 0


def test_complexity_is_compared_with_the_nearest_reference() -> None:
    one = [Example("a", "s", (CODE["python"], "return a if b and c else d"))]
    found = complexity_difference.score(["return 1"], one, seed=1)
    assert found.value == 1  # 1 against 2 and 3
    assert "answers:1.00|references:2.50" in found.signature
