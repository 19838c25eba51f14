"""Your own jsonl, csv and conversations: shapes, splits, and the errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from peftlab.batches import IGNORED, RowBuilder
from peftlab.config import TaskSettings, build_config
from peftlab.errors import ConfigError, DataError
from peftlab.own_files import OwnFileSettings
from peftlab.task import CHAT_PROMPT, Example, Splits, Task, render_prompt
from peftlab.task_data import load_splits
from peftlab.tasks import chat, csv, jsonl

PAIRS = [{"prompt": f"say {n}", "completion": f"word {n}"} for n in range(20)]
LABELS = [{"text": f"film {n}", "label": ("no", "yes")[n % 2]} for n in range(20)]
TEXTS = [{"text": f"once {n}"} for n in range(20)]
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)


def write(folder: Path, **files: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder


def write_csv(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def sources(splits: Splits) -> list[set[str]]:
    return [{e.source for e in part} for part in (splits.train, splits.validation, splits.test)]


def conversation(n: int) -> dict[str, Any]:
    turns = [
        ("system", "be brief"),
        ("user", f"ask {n}"),
        ("assistant", f"one {n}"),
        ("user", "and"),
        ("assistant", "two"),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("leaf", [jsonl, csv, chat])
def test_they_are_tasks(leaf: Any) -> None:
    assert isinstance(leaf, Task)
    with pytest.raises(DataError, match=r"give their folder with --data-dir; expected train\."):
        leaf.load(None, seed=1)


def test_one_file_is_split_and_csv_reads_as_jsonl(tmp_path: Path) -> None:
    splits = jsonl.load(write(tmp_path / "j", anything=PAIRS), seed=1)
    assert [len(part) for part in sources(splits)] == [16, 2, 2]
    assert not set.intersection(*sources(splits))
    again = csv.load(write_csv(tmp_path / "c", "mine", PAIRS), seed=1)
    assert (again.train, again.validation, again.test) == (splits.train, splits.validation, splits.test)
    reverse = jsonl.load(write(tmp_path / "r", anything=PAIRS[::-1]), seed=1)
    assert sources(reverse) == sources(splits), "the order of the rows decides nothing"
    assert sources(jsonl.load(tmp_path / "j", seed=2)) != sources(splits)


def test_files_by_split_and_what_is_shared(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "d", train=[*PAIRS[:10], PAIRS[0], PAIRS[12]], val=PAIRS[10:12], test=PAIRS[12:14]
    )
    splits = jsonl.load(folder, seed=1)
    assert [len(part) for part in sources(splits)] == [10, 2, 2]
    assert splits.notes == (
        "train.jsonl: duplicate rows kept: 1",
        "train: rows dropped because they also stand in test: 1",
    )
    assert [f.name for f in splits.files] == ["train.jsonl", "val.jsonl", "test.jsonl"]
    (folder / "val.jsonl").unlink()
    (folder / "test.jsonl").unlink()
    alone = jsonl.load(folder, seed=1)
    assert [len(part) for part in sources(alone)] == [10, 1, 0]
    assert any("test: no file" in note for note in alone.notes)


def test_prompts_with_several_completions(tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "say 3", "completion": "drei"}]
    splits = jsonl.load(write(tmp_path / "d", train=rows, validation=PAIRS[:1], test=PAIRS[1:2]), seed=1)
    assert next(e for e in splits.train if e.source == "say 3").references == ("word 3", "drei")


def test_labels(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", train=LABELS[:14], validation=LABELS[14:17], test=LABELS[17:])
    splits = jsonl.load(folder, seed=1)
    assert splits.labels == ("no", "yes")
    assert [e.label for e in splits.test] == [1, 0, 1]
    numbers = [{"text": row["text"], "label": n % 2} for n, row in enumerate(LABELS)]
    assert jsonl.load(write(tmp_path / "n", rows=numbers), seed=1).labels == ("0", "1")
    write(folder, test=[{"text": "a", "label": "yess"}])
    with pytest.raises(
        DataError, match=r"test\.jsonl, line 1: unknown label 'yess' \(did you mean 'yes'\?\)"
    ):
        jsonl.load(folder, seed=1)


def test_whole_texts_are_learnt_and_not_asked(tmp_path: Path) -> None:
    splits = jsonl.load(write(tmp_path / "d", corpus=TEXTS), seed=1)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [18, 2, 0]
    assert any("the validation loss tells" in note for note in splits.notes)
    for opens in (True, False):  # with and without a token that opens texts
        tokenizer = tiny_models.tokenizer(byte_level=True, opens=opens)
        builder = RowBuilder(tokenizer, prompt=jsonl.PROMPT, head="causal", max_length=40)
        rows, count = builder.build(splits.train[:1])
        learnt = [token for token in rows[0].labels if token != IGNORED]
        assert tokenizer.decode(learnt, skip_special_tokens=True) == splits.train[0].references[0]
        assert learnt[-1] == tokenizer.eos_token_id
        assert not count.dropped
        short = RowBuilder(tokenizer, prompt=jsonl.PROMPT, head="causal", max_length=8)
        assert short.build([Example("a", "", ("far too long a text",))])[1].dropped.total() == 1


def test_columns_are_named(tmp_path: Path) -> None:
    rows = [{"question": r["prompt"], "answer": r["completion"], "by": "me"} for r in PAIRS]
    folder = write(tmp_path / "d", rows=rows)
    with pytest.raises(
        DataError, match=r"expected the columns prompt and completion, or .*found question, answer, by"
    ):
        jsonl.load(folder, seed=1)
    named = TaskSettings(
        name="jsonl", data_dir=folder, settings={"prompt": "question", "completion": "answer"}
    )
    splits = load_splits(named, seed=1)
    assert splits.notes == ("rows.jsonl: columns passed over: by",)
    assert named.settings["text"] == "text", "defaults are written out"
    upper = [{"Question": f"a{n}", "Answer": "b"} for n in range(9)]
    names = OwnFileSettings(prompt="Question", completion="Answer")
    assert len(csv.load(write_csv(tmp_path / "c", "x", upper), seed=1, settings=names).train) == 7


def test_settings_are_checked_by_the_task() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'task\.settings\.promt' \(did you mean 'prompt'\?\)"):
        build_config({"task": {"name": "jsonl", "settings": {"promt": "x"}}})
    with pytest.raises(
        ConfigError, match="the task 'embedded' has no settings of its own, so language would have"
    ):
        build_config({"task": {"settings": {"language": "java"}}})
    with pytest.raises(ConfigError, match=r"give one of task\.data_dir, task\.hub"):
        build_config({"task": {"name": "jsonl", "data_dir": "x", "hub": "a/b"}})
    with pytest.raises(ConfigError, match=r"archive_sha256 has no effect without task\.archive"):
        build_config({"task": {"name": "jsonl", "archive_sha256": "0" * 64}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "rows.jsonl: no rows; the file is empty"),
        (b'{"prompt": "a", "completion": "b"}\n{broken\n', "rows.jsonl, line 2: not JSON"),
        (b'{"prompt": "a", "completion": "b"}\n[1]\n', "line 2: expected an object"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2: 'completion' is missing"),
        (b'{"prompt": "a", "completion": 3}\n', "line 1: 'completion' must be a text, got 3"),
        (b'{"prompt": "a", "completion": " "}\n', "line 1: 'completion' is empty"),
        (b'{"prompt": "\xff", "completion": "b"}\n', "line 1: byte 0xff is not UTF-8"),
        (b'{"prompt": "a", "completion": "b"}\n', "1 different rows leave nothing to train on"),
        (
            b'{"text": "a", "label": "b"}\n{"text": "c", "label": "b"}\n{"text": "d", "label": "b"}\n',
            "at least two classes",
        ),
    ],
)
def test_rows_that_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        jsonl.load(tmp_path, seed=1)
    assert said in str(caught.value)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.jsonl file; expected train\.jsonl"):
        jsonl.load(tmp_path, seed=1)
    with pytest.raises(DataError, match="is not a folder"):
        jsonl.load(tmp_path / "gone", seed=1)
    with pytest.raises(DataError, match=r"holds a\.jsonl, b\.jsonl; expected"):
        jsonl.load(write(tmp_path / "two", a=PAIRS, b=PAIRS), seed=1)
    with pytest.raises(DataError, match=r"holds validation twice: dev\.jsonl, val\.jsonl"):
        jsonl.load(write(tmp_path / "vals", train=PAIRS, dev=PAIRS, val=PAIRS), seed=1)
    with pytest.raises(DataError, match="every row of train also stands in test"):
        jsonl.load(write(tmp_path / "same", train=PAIRS, test=PAIRS), seed=1)
    with pytest.raises(DataError, match="rows of different shapes"):
        jsonl.load(write(tmp_path / "mixed", train=PAIRS, test=LABELS), seed=1)


def chat_tokenizer() -> Any:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_conversations(tmp_path: Path) -> None:
    splits = chat.load(write(tmp_path / "d", talks=[conversation(n) for n in range(20)]), seed=1)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [32, 4, 4], (
        "two answers each"
    )
    first = splits.train[0]
    assert [m["role"] for m in json.loads(first.source)] == ["system", "user"]
    assert first.references[0].startswith("one")
    assert render_prompt(CHAT_PROMPT, first.source) == first.source


def test_only_the_assistants_answers_are_learnt(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    example = chat.load(write(tmp_path / "d", talks=[conversation(n) for n in range(20)]), seed=1).train[1]
    builder = RowBuilder(tokenizer, prompt=CHAT_PROMPT, head="causal", max_length=120)
    (row,), _ = builder.build([example])
    whole = [*json.loads(example.source), {"role": "assistant", "content": "two"}]
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(whole, tokenize=False)
    learnt = [token for token in row.labels if token != IGNORED]
    assert tokenizer.decode(learnt) == "two</s>"
    prompt = builder.prompt_ids(example.source, room=120)
    assert row.input_ids[: len(prompt)] == prompt, "what is asked is what was trained (law 5)"
    assert builder.prompt_ids("ask", room=99) == builder.prompt_ids(
        '[{"role": "user", "content": "ask"}]', room=99
    )


def test_a_template_whose_tokens_stop_at_the_prompt_is_taken_as_it_writes() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("'<s>assistant '", "'<s>assistant\\n'").replace(
        "' ' + m", "'\\n' + m"
    )
    builder = RowBuilder(tokenizer, prompt=CHAT_PROMPT, head="causal", max_length=120)
    turns = [{"role": "user", "content": "ask"}]
    row, _ = builder.build([Example("a", json.dumps(turns), ("Yes.",))])
    whole = [*turns, {"role": "assistant", "content": "Yes."}]
    assert row[0].input_ids == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)


def test_long_conversations_lose_their_oldest_messages() -> None:
    tokenizer = chat_tokenizer()
    builder = RowBuilder(tokenizer, prompt=CHAT_PROMPT, head="causal", max_length=120)
    turns = [*conversation(1)["messages"], {"role": "user", "content": "last"}]
    whole = builder.prompt_ids(json.dumps(turns), room=500)
    shorter = tokenizer.decode(builder.prompt_ids(json.dumps(turns), room=len(whole) - 1))
    assert "ask 1" not in shorter
    assert shorter.startswith("<s>system be brief</s><s>user and</s>")
    cut = tokenizer.decode(builder.prompt_ids(json.dumps([{"role": "user", "content": "x" * 99}]), room=40))
    assert cut.endswith("x</s><s>assistant ")
    assert cut.count("x") < 99
    with pytest.raises(DataError, match="does not fit 3 tokens"):
        builder.prompt_ids("hello", room=3)


def test_templates_that_cannot_be_used() -> None:
    plain = tiny_models.tokenizer(byte_level=True)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        RowBuilder(plain, prompt=CHAT_PROMPT, head="causal", max_length=40)
    asked = "{% if add_generation_prompt %}a{% else %}{{ messages[-1].content }}{% endif %}"
    plain.chat_template = "{{ messages | length }}" + asked
    with pytest.raises(DataError, match="writes a conversation otherwise once it is answered"):
        RowBuilder(plain, prompt=CHAT_PROMPT, head="causal", max_length=40).chat.answer_ids("x", "y")
    turns = "{% for m in messages %}MORE{{ m.content }}{% endfor %}"
    for template, said in (
        ("{{ raise_exception('no system') }}", "refuses the roles user: no system"),
        (
            turns.replace("MORE", "{{ m.role }}: "),
            "does not open the assistant's turn .* but writes 'assistant: '",
        ),
        ("{{ messages[0].content }}", "does not write what the assistant says"),
        ("{{ messages + 1 }}", r"cannot be filled \(TypeError: "),
    ):
        plain.chat_template = template
        builder = RowBuilder(plain, prompt=CHAT_PROMPT, head="causal", max_length=40)
        with pytest.raises(DataError, match=said):
            builder.prompt_ids("x", room=9)
        with pytest.raises(DataError, match=said):
            builder.build([Example("a", "x", ("y",))])


def test_templates_that_are_used() -> None:
    """An answer that follows at once needs no opening; what a template leaves out or adds of thoughts is its own."""
    opened = "{% if add_generation_prompt %}<bot>{% endif %}"
    for template, learnt in (
        ("{% for m in messages %}{{ m.content }}|{% endfor %}", "y|"),
        (
            "{% for m in messages %}{% if m.role != 'user' %}<bot><t></t>{% endif %}{{ m.content }}{% endfor %}"
            + opened,
            "<t></t>y",
        ),
    ):
        tokenizer = tiny_models.tokenizer(byte_level=True)
        tokenizer.chat_template = template
        rows, _ = RowBuilder(tokenizer, prompt=CHAT_PROMPT, head="causal", max_length=80).build(
            [Example("a", "x", ("y",))]
        )
        assert tokenizer.decode([i for i in rows[0].labels if i != IGNORED][:-1]) == learnt


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "line 1: expected 'messages', a list of messages; found: text"),
        ({"messages": []}, "expected 'messages', a list of messages"),
        ({"messages": [{"role": "user"}]}, "line 1, message 1: expected the texts 'role' and 'content'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1: unknown role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message has the role assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the assistant speaks first"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: 'content' is empty"),
    ],
)
def test_conversations_that_are_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        chat.load(write(tmp_path / "d", talks=[row]), seed=1)
    assert said in str(caught.value)
