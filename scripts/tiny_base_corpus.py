"""The text that the tiny base is pretrained on: records put into words, and plain text, all made by rules.

A document is a record of one of twelve domains (`tiny_base_words.py`) in one of sixteen notations, then a text that
says all of it; every third document is something else: a list to repeat, a question on a record, a small story.

The embedded task (`peftlab/tasks/embedded.py`) is left out on purpose: no place to eat or drink, and neither its
notation nor its prompt. `FORBIDDEN` says which words that rules out; `generate` draws no document that holds one.

Example:
    >>> from tiny_base_corpus import generate
    >>> len(generate(3, seed=1))
    3
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiny_base_words import DOMAINS, NATION, PART, STARS, novel, person, syllable_word

FORBIDDEN = re.compile(
    r"restaurant|\bpubs?\b|coffee|\bshops?\b|\beat(s|ing|type)?\b|food|\bmeals?\b|\bdin(e|er|ing)\b|cuisine"
    r"|\bmenus?\b|\bcaf[eé]\b|\bbars?\b|bistro|customer rating|price ?range|family ?friendly|meaning:|^text:|\w\[",
    re.IGNORECASE | re.MULTILINE,
)
Record = list[tuple[str, str]]
Document = tuple[str, str]


def _article(text: str) -> str:
    """Replace each "{a}" by "a" or "an", as the next word asks."""
    return re.sub(
        r"\{a\} (\W*)(\w+)", lambda m: f"{'an' if m[2][0] in 'aeiouAEIOU' else 'a'} {m[1]}{m[2]}", text
    )


def _join(parts: Sequence[str]) -> str:
    """The parts as a list in a sentence: "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


# --- records -----------------------------------------------------------------------------------------------
def _table(record: Record) -> str:
    return f"| {' | '.join(k for k, _ in record)} |\n| {' | '.join(v for _, v in record)} |"


NOTATIONS: list[Callable[[Record], str]] = [
    lambda record: json.dumps(dict(record), ensure_ascii=False),
    lambda record: " ".join(f"{k} = {v};" for k, v in record),
    lambda record: "\n".join(f"{k}: {v}" for k, v in record),
    lambda record: "\n".join(f"- {k}: {v}" for k, v in record),
    _table,
    lambda record: "".join(f"<{k}>{v}</{k}>" for k, v in record),
    lambda record: "; ".join(f"{k} -> {v}" for k, v in record),
    lambda record: ", ".join(f"{k}({v})" for k, v in record),
    lambda record: ", ".join(f"{k} {{{v}}}" for k, v in record),
    lambda record: " | ".join(f"{k} : {v}" for k, v in record),
    lambda record: ", ".join(f'{k} "{v}"' for k, v in record),
    lambda record: ", ".join(f"{k}={v}" for k, v in record),
    lambda record: " ".join(f"({record[0][1]}, {k}, {v})" for k, v in record[1:]),
    lambda record: "\n".join(f"{i}. {k} is {v}" for i, (k, v) in enumerate(record, 1)),
    lambda record: f"{','.join(k for k, _ in record)}\n{','.join(v for _, v in record)}",
    lambda record: "\n".join(f"@{k} {v}" for k, v in record),
]
LABELS = [
    ("data", "sentence"), ("record", "description"), ("input", "output"), ("facts", "summary"),
    ("source", "target"), ("row", "in words"), ("given", "answer"), ("entry", "report"), ("", ""),
    ("notes", "story"), ("card", "written out"),
]  # fmt: skip


def _say(way: str, value: str) -> str:
    """One way with its value; a yes/no way is a pair of ways."""
    if "|" in way:
        yes, no = way.split("|")
        return yes if value == "yes" else no
    return _article(way.replace("{v}", value))


class Fact(NamedTuple):
    """The ways to say one key: as a verb phrase, after a noun, before a noun."""

    verbs: list[str]
    after: list[str]
    before: list[str]


def _value(rng: random.Random, value: str) -> str:
    """The value, or in one of five cases a new word for one that is a word: what cannot be known must be copied."""
    if value in ("yes", "no") or not value.isalpha() or rng.random() < 0.8:
        return value
    word = syllable_word(rng)
    return word if value[0].isupper() else word.lower()


def _record(rng: random.Random) -> tuple[str, str, str, Record, list[Fact]]:
    """Draw a record.

    Args:
        rng: Draws.

    Returns:
        Subject, noun, pronoun, the record in random order, and its facts.
    """
    nouns, pronoun, label, keys = DOMAINS[rng.choice(list(DOMAINS))]
    subject = person(rng) if label == "name" else novel(rng)
    noun = rng.choice(nouns.split(", "))
    record: Record = [(label, subject)]
    facts: list[Fact] = []
    if rng.random() < 0.7:
        noun = _value(rng, noun)
        record.append((rng.choice(["type", "kind", "sort"]), noun))
    for key, draw, ways in rng.sample(keys, rng.randint(1, len(keys))):
        value = _value(rng, draw(rng))
        record.append((key, value))
        verbs = [_say(w, value) for w in ways if w[0] not in "+^"]
        after, before = ([_say(w[1:], value) for w in ways if w[0] == mark] for mark in "+^")
        facts.append(Fact(verbs, after, before))
    if rng.random() < 0.5:
        rng.shuffle(record)
    rng.shuffle(facts)
    return subject, noun, pronoun, record, facts


def _rest(rng: random.Random, pronoun: str, facts: list[Fact]) -> str:
    """Sentences with a pronoun for subject that say all facts."""
    sentences = []
    facts = list(facts)
    while facts:
        taken = [rng.choice(facts.pop(0).verbs) for _ in range(min(len(facts), rng.randint(1, 3)))]
        sentences.append(f"{_upper(pronoun)} {_join(taken)}.")
    return " ".join(sentences)


def _text(rng: random.Random, subject: str, noun: str, pronoun: str, facts: list[Fact]) -> str:
    """One text that says all facts, in one of twelve shapes."""
    facts = list(facts)
    after = ""
    for fact in [f for f in facts if f.before][: rng.randint(0, 2)]:
        facts.remove(fact)
        noun = f"{rng.choice(fact.before)} {noun}"
    for fact in [f for f in facts if f.after][: rng.randint(0, 2)]:
        facts.remove(fact)
        after += " " + rng.choice(fact.after)
    verb = rng.choice(facts.pop(0).verbs) if facts else f"is {{a}} {noun}"
    front = next((f for f in facts if f.after), None)
    shapes = [
        f"{subject} is {{a}} {noun}{after}. {_upper(pronoun)} {verb}.",
        f"{subject} is {{a}} {noun}{after} that {verb}.",
        f"There is {{a}} {noun}{after} called {subject}. {_upper(pronoun)} {verb}.",
        f"{subject}, {{a}} {noun}{after}, {verb}.",
        f"The {noun} {subject} {verb}."
        if not after
        else f"The {noun}{after} is called {subject} and {verb}.",
        f"{subject} {verb} and is {{a}} {noun}{after}.",
        f"Looking for {{a}} {noun}{after}? {subject} {verb}.",
        f"You will find {subject}, {{a}} {noun}{after}, which {verb}.",
        f"If you want {{a}} {noun}{after}, choose {subject}, which {verb}.",
        f"One {noun}{after} is {subject}, which {verb}.",
    ]
    if front:
        phrase = rng.choice(front.after)
        shaped = [
            f"{_upper(phrase)}, {subject} is {{a}} {noun}{after} and {verb}.",
            f"{_upper(phrase)}, there is {subject}, {{a}} {noun}{after}. {_upper(pronoun)} {verb}.",
        ]
        if rng.random() < 0.3:
            facts.remove(front)
            shapes = shaped
    text = _article(rng.choice(shapes))
    return f"{text} {_rest(rng, pronoun, facts)}".strip()


def record_document(rng: random.Random) -> Document:
    """A record in some notation, and a text that says it."""
    subject, noun, pronoun, record, facts = _record(rng)
    text = _text(rng, subject, noun, pronoun, facts)
    before, behind = rng.choice(LABELS)
    notation = rng.choice(NOTATIONS)(record)
    if rng.random() < 0.2:
        before, behind = before.upper(), behind.upper()
    gap = rng.choice([" ", "\n"]) if "\n" not in notation else "\n"
    head = f"{before}:{gap}{notation}\n{behind}:" if before else f"{notation}\n=>"
    return head, text


# --- other text -------------------------------------------------------------------------------------------------
def repeat_document(rng: random.Random) -> Document:
    """A list of names, and the same again in some order."""
    names = [
        rng.choice([novel, person, syllable_word, NATION, PART, STARS])(rng) for _ in range(rng.randint(2, 7))
    ]
    listed = ", ".join(names)
    kind = rng.randrange(4)
    if kind == 0:
        return f"Say it again: {listed}\nAgain:", listed
    if kind == 1:
        return f"Backwards: {listed}\nDone:", ", ".join(reversed(names))
    if kind == 2:
        return f"List: {listed}\nIn words:", f"The list has {_join(names)}."
    i = rng.randrange(len(names))
    return f"List: {listed}\nWhich is number {i + 1}?", f"Number {i + 1} is {names[i]}."


def copy_document(rng: random.Random) -> Document:
    """A few names, and just the same again."""
    listed = ", ".join(
        rng.choice([novel, person, syllable_word, NATION, STARS])(rng) for _ in range(rng.randint(1, 4))
    )
    return rng.choice(
        [f"Copy: {listed}\nCopy:", f"{listed}\n", f"Again: {listed}\nAgain:", f"{listed} ="]
    ), listed


def question_document(rng: random.Random) -> Document:
    """A record and one question on it, or a text and the record behind it."""
    subject, noun, pronoun, record, facts = _record(rng)
    if rng.random() < 0.5:
        key, value = rng.choice(record)
        return f"{rng.choice(NOTATIONS)(record)}\nWhat is the {key}?", f"The {key} is {value}."
    return f"Text of the {noun}: {_text(rng, subject, noun, pronoun, facts)}\nRecord:", rng.choice(NOTATIONS)(
        record
    )


def story_document(rng: random.Random) -> Document:
    """A few plain sentences about someone on the way."""
    who, place, other = person(rng), novel(rng), person(rng)
    day = rng.choice(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"])
    mood = rng.choice(["happy", "tired", "glad", "curious", "calm", "late", "early", "alone"])
    sentences = [
        f"On {day} {who} went to {place}, which is near {novel(rng)}.",
        f"The way was {rng.choice(['long', 'short', 'easy', 'hard'])} "
        f"and the sky was {rng.choice(['grey', 'blue', 'dark'])}.",
        f"There {who} met {other} and was {mood}.",
        f'"Where is {place}?" asked {other}. "It is in the {PART(rng)} area," said {who}.',
        f"They stayed at {place} for {rng.randint(2, 20)} days and did not want to leave.",
        f"Later {other} wrote a letter to {who}, but it never came to {place}.",
    ]
    first, rest = sentences[0], sentences[1:]
    rng.shuffle(rest)
    return first, " ".join(rest[: rng.randint(2, 5)])


def generate(count: int, *, seed: int) -> list[Document]:
    """The corpus.

    Args:
        count: How many documents.
        seed: Seeds all draws.

    Returns:
        Documents, each a head and a text; the document is "head text". The same for the same arguments.
    """
    rng = random.Random(seed)
    kinds = (
        [record_document] * 12 + [copy_document] * 3 + [repeat_document, question_document, story_document]
    )
    documents = []
    while len(documents) < count:
        head, text = rng.choice(kinds)(rng)
        if not FORBIDDEN.search(f"{head} {text}"):  # random syllables can spell one
            documents.append((head, text))
    return documents
