"""Your own conversations: messages with roles, written as the tokenizer's chat template writes them.

A line of the .jsonl files is one conversation:

```
{"messages": [{"role": "system", "content": "Answer briefly."},
              {"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."},
              {"role": "user", "content": "And of Spain?"}, {"role": "assistant", "content": "Madrid."}]}
```

Each answer of the assistant is one row: the conversation before it is the prompt, and the answer alone carries labels. So
every answer of the assistant is learnt, and scored, exactly as it is asked for. Conversations that begin alike, up to the
assistant's first answer, stay in one split. The system's message counts there, as it often holds what the question is
about: so the same question under another system's message may stand in another split. `peftlab.own_files` says which
files there may be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlab.data_files import Record, read_json_lines
from peftlab.errors import DataError
from peftlab.own_files import OwnRow, divide, find_files
from peftlab.settings import Settings as _Settings
from peftlab.task import CHAT_PROMPT, Example, Splits

PROMPT = CHAT_PROMPT
METRICS = ("rouge_l", "bleu")
HUB_FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}

_ROLES = ("system", "user", "assistant", "tool")


class Settings(_Settings):
    """Where the conversation stands in a row."""

    messages: str = "messages"
    """Key of the list of messages."""


def load(data_dir: Path | None, *, seed: int, settings: Settings | None = None) -> Splits:
    """Read your conversations.

    Args:
        data_dir: The folder that holds train.jsonl and where there are any validation.jsonl and test.jsonl, or one file.
        seed: Seeds the split of what has no file of its own.
        settings: The key of the messages; "messages" where None.

    Returns:
        The splits. An example's source is the conversation so far as JSON, its reference the answer.

    Raises:
        DataError: A file is missing, empty or malformed; names file and line.
    """
    key = (settings or Settings()).messages
    files = find_files(data_dir, ".jsonl", task="chat")
    rows = {}
    for split, path in files.items():
        rows[split] = [row for record in read_json_lines(path) for row in _answers(record, key)]
        if not rows[split]:
            raise DataError(f"{path}: no rows; the file is empty")
    parts, notes = divide(rows, 0.1, 0.1, seed=seed)
    made = {split: _examples(split, part) for split, part in parts.items()}
    return Splits(made["train"], made["validation"], made["test"], tuple(files.values()), tuple(notes))


def _answers(record: Record, key: str) -> list[OwnRow]:
    """One row for each answer of the assistant."""
    messages = _messages(record, key)
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise DataError(f"{record.where}: no message has the role assistant, so there is nothing to learn")
    if first == 0:
        raise DataError(f"{record.where}: the assistant speaks first; there must be something it answers")
    opening = json.dumps(messages[:first], ensure_ascii=False)
    return [
        OwnRow(record.where, opening, json.dumps(messages[:i], ensure_ascii=False), answer=message["content"])
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def _messages(record: Record, key: str) -> list[Mapping[str, Any]]:
    """The messages of one conversation, checked."""
    messages = record.values.get(key)
    if not isinstance(messages, list) or not messages:
        found = ", ".join(map(str, record.values)) or "nothing"
        raise DataError(f"{record.where}: expected '{key}', a list of messages; found: {found}")
    for number, message in enumerate(messages, start=1):
        where = f"{record.where}, message {number}"
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise DataError(f"{where}: expected the texts 'role' and 'content', got {str(message)[:80]}")
        if message["role"] not in _ROLES:
            raise DataError(f"{where}: unknown role '{message['role']}'; there is: {', '.join(_ROLES)}")
        if message["role"] in ("user", "assistant") and not message["content"].strip():
            raise DataError(f"{where}: 'content' is empty; fill it or leave the conversation out")
    return messages


def _examples(split: str, rows: list[OwnRow]) -> tuple[Example, ...]:
    """One example for each conversation so far, with all answers it was given."""
    grouped: dict[str, list[str]] = {}
    for row in rows:
        grouped.setdefault(row.source, []).append(row.answer)
    return tuple(
        Example(f"{split}-{index}", source, tuple(dict.fromkeys(answers)))
        for index, (source, answers) in enumerate(grouped.items())
    )
