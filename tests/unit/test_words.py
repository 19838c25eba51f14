"""Words and tokens meet exactly, with every kind of tokenizer, and the measure of that cannot be fooled."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as T
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers.convert_slow_tokenizer import TikTokenConverter

import tiny_models
from peftlab.errors import DataError
from peftlab.inspection import words
from peftlab.inspection.tokenized import TokenReader
from peftlab.inspection.words import align_words, find_words, measure_alignment, special_positions

LINES = (Path(__file__).parents[1] / "golden" / "difficult_lines.txt").read_text("utf-8").splitlines()
ENOUGH = 0.98

T5_PIECES, ALBERT_PIECES = "t5/spiece.model", "albert/spiece.model"
TEST_PIECES, SMALL_PIECES = "test_sentencepiece/test_sentencepiece.model", "torchtune_small/m.model"
REFERENCE: dict[str, tuple[str, str]] = {  # name: class or way to load, file
    "bert": ("AutoTokenizer", "bert_uncased_minilm"),
    "gpt2": ("AutoTokenizer", "gpt2"),
    "albert": ("AlbertTokenizer", ALBERT_PIECES),
    "t5": ("T5Tokenizer", T5_PIECES),
    "llama small": ("LlamaTokenizer", SMALL_PIECES),
    "llama test": ("LlamaTokenizer", TEST_PIECES),
    "tiny byte BPE": ("PreTrainedTokenizerFast", "torchtune_small/tiny_bpe_tokenizer.json"),
    "tiktoken": ("tiktoken", "torchtune_small/tiktoken_small.model"),
    "slow test": ("BertGenerationTokenizer", TEST_PIECES),
    "slow t5": ("BertGenerationTokenizer", T5_PIECES),
    "slow albert": ("BertGenerationTokenizer", ALBERT_PIECES),
    "slow siglip": ("SiglipTokenizer", T5_PIECES),
}
"""Every tokenizer of the reference data, and its pieces read by slow tokenizers, which give no offsets."""


class _TikToken(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        pairs = (line.split() for line in Path(tiktoken_url).read_text("utf-8").splitlines())
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


def load(name: str, folder: Path, own: Path) -> Any:
    kind, file = REFERENCE[name]
    path = folder / file
    if kind == "tiktoken":
        return T.PreTrainedTokenizerFast(tokenizer_object=_TikToken(str(path)).converted())
    if kind == "PreTrainedTokenizerFast":
        return T.PreTrainedTokenizerFast(tokenizer_file=str(path))
    if path.is_file():
        shutil.copy(path, own / ("tokenizer.model" if kind == "LlamaTokenizer" else "spiece.model"))
        path = own
    return getattr(T, kind).from_pretrained(path)


@pytest.mark.parametrize("name", REFERENCE)
def test_words_have_exactly_their_tokens(name: str, shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load(name, shared_data / "tokenizers", tmp_path)
    report = measure_alignment(tokenizer, LINES)
    print(name, report)
    assert report.num_words == sum(len(line.split()) for line in LINES)
    assert report.rate >= ENOUGH
    kept = (report.num_exact - report.num_lost) / (report.num_words - report.num_lost)
    assert kept >= ENOUGH  # words that the vocabulary has nothing for do not lift the rate
    assert measure_alignment(tokenizer).rate >= ENOUGH


@pytest.mark.parametrize("name", REFERENCE)
def test_words_end_where_the_tokenizer_is_when_it_has_read_so_far(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    """A second witness that knows no offsets: a text cut after a word reads as the beginning of the whole one."""
    tokenizer = load(name, shared_data / "tokenizers", tmp_path)
    total = right = 0
    for line, tokens in zip(LINES, TokenReader(tokenizer).read(LINES), strict=True):
        spans = words.word_spans(tokens)
        first = int(np.argmin(tokens.special)) if not tokens.special.all() else 0
        ends = [line[:end] for end in spans.characters[:, 1].tolist()]
        before = 0
        for ids, (start, end) in zip(
            tokenizer(ends, add_special_tokens=False)["input_ids"], spans.tokens.tolist(), strict=True
        ):
            total += 1
            blank = start == end  # none of the tokens in between says a letter
            said = TokenReader(tokenizer).says(ids[before:]) if blank else ""
            right += (blank and said == "") or (start >= first + before and end == first + len(ids))
            before = len(ids)
    assert right / total >= ENOUGH


def shifted(spans: words.WordSpans) -> words.WordSpans:
    return replace(spans, tokens=spans.tokens + 1)


def empty(spans: words.WordSpans) -> words.WordSpans:
    return replace(spans, tokens=np.zeros_like(spans.tokens))


def everything(spans: words.WordSpans) -> words.WordSpans:
    return replace(spans, tokens=np.tile([0, len(spans.word_of_token)], (len(spans.tokens), 1)))


def too_long(spans: words.WordSpans) -> words.WordSpans:
    return replace(spans, tokens=spans.tokens + np.array([0, 1]))


@pytest.mark.parametrize("wrong", [shifted, empty, everything, too_long])
def test_the_measure_sees_wrong_spans(
    wrong: Callable[[words.WordSpans], words.WordSpans], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, right = tiny_models.tokenizer(byte_level=True), words.word_spans
    assert measure_alignment(tokenizer, LINES).rate == 1.0
    monkeypatch.setattr(words, "word_spans", lambda tokens: wrong(right(tokens)))
    report = measure_alignment(tokenizer, LINES)
    assert (
        report.rate < 0.7
    )  # too_long often takes in a blank only, which says nothing; the others are near 0
    assert report.examples


def test_words_are_runs_without_white_space() -> None:
    text = " non\u00a0breaking  漢字　全角 日本語。\t"
    assert [text[a:b] for a, b in find_words(text)] == ["non", "breaking", "漢字", "全角", "日本語。"]
    assert find_words(" \t").shape == (0, 2)


def test_special_positions_have_names() -> None:
    tokenizer = tiny_models.tokenizer(closes=True)
    aligned = align_words(tokenizer, "the cat")
    assert aligned.special == {0: ("bos",), 3: ("eos",)}
    assert aligned.words.word_of_token.tolist() == [-1, 0, 1, -1]
    double = tiny_models.tokenizer(closes=True, pad_is_eos=True)
    assert align_words(double, "the cat").special[3] == ("eos", "pad")
    assert special_positions(tokenizer, [tokenizer.unk_token_id]) == {}


def test_bert_positions_have_names_and_a_mask_in_the_text_is_a_word(shared_data: Path) -> None:
    tokenizer = T.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "bert_uncased_minilm")
    aligned = align_words(tokenizer, "the [MASK] sat")
    assert aligned.special == {0: ("cls",), 2: ("mask",), 4: ("sep",)}
    assert aligned.words.tokens.tolist() == [[1, 2], [2, 3], [3, 4]]


def pieces(
    vocabulary: list[str], merges: list[tuple[str, str]], unknown: str | None = None
) -> T.PreTrainedTokenizerFast:
    """A tokenizer without pre-tokenizer, as Llama's and Gemma's: blanks are letters like others."""
    numbered = {piece: i for i, piece in enumerate(vocabulary)}
    made = Tokenizer(models.BPE(numbered, merges, unk_token=unknown, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return T.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown)


def test_a_token_that_spans_words_is_reported() -> None:
    tokenizer = pieces(["▁", "o", "f", "t", "h", "e", "of", "of▁"], [("o", "f"), ("of", "▁")])
    (tokens,) = TokenReader(tokenizer).read(["of the"])
    assert words.word_spans(tokens).spanning == ()  # it stands for one word and a blank
    tokenizer = pieces(["▁", "o", "f", "t", "h", "e", "f▁", "f▁t"], [("f", "▁"), ("f▁", "t")])
    aligned = align_words(tokenizer, "of the")
    assert aligned.words.spanning == (1,)
    assert aligned.words.tokens.tolist() == [[0, 2], [1, 4]]
    report = measure_alignment(tokenizer, ["of the", "the of"])
    assert (report.num_spanning, report.num_exact, report.num_words) == (1, 2, 4)
    assert "1 tokens span words" in str(report)


def test_an_unknown_token_that_spans_words_is_right_for_none_of_them() -> None:
    """Alone, each of the two says what the one token of both says; the blanks are unknown as well."""
    report = measure_alignment(pieces(["<unk>", "a"], [], unknown="<unk>"), ["a é é a"])
    assert (report.num_spanning, report.num_exact, report.num_words) == (1, 2, 4)


def test_what_follows_a_dropped_character_is_not_shifted() -> None:
    """The tokenizer's own offsets run behind by a character for each one that its vocabulary lacks."""
    tokenizer = pieces(["▁", *"abcdefg"], [])
    text = "aéb ßß cd éfg"
    given = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert given[-1] != (len(text) - 1, len(text))
    aligned = align_words(tokenizer, text)
    assert aligned.tokens.rebuilt
    said = [tokenizer.decode(aligned.tokens.ids[a:b]) for a, b in aligned.words.tokens]
    assert said == ["ab", "", "cd", "fg"]
    assert [text[a:b] for a, b in aligned.tokens.offsets[-2:]] == ["f", "g"]


class _ZeroWidth:
    """A fast tokenizer as early Llama 3 ones were: every offset ends where it starts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        encoded = self._tokenizer(*texts, **options)
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = [[(a, a) for a, _ in row] for row in encoded["offset_mapping"]]
        return encoded


def test_offsets_without_width_are_rebuilt() -> None:
    true = tiny_models.tokenizer(byte_level=True, closes=True)
    reader, broken = TokenReader(true), TokenReader(_ZeroWidth(true))
    assert measure_alignment(_ZeroWidth(true), LINES).rate == 1.0
    for line, right, rebuilt in zip(LINES, reader.read(LINES), broken.read(LINES), strict=True):
        assert rebuilt.rebuilt
        assert not right.rebuilt
        if line.isascii():
            for (a, b), (c, d) in zip(right.offsets, rebuilt.offsets, strict=True):
                assert line[a:b].strip() == line[c:d].strip()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_slow_tokenizer_gets_offsets_also_where_texts_are_cut(side: str) -> None:
    tokenizer = T.ByT5Tokenizer(truncation_side=side)
    (whole,) = TokenReader(tokenizer).read(["né 日本 ab"])
    letters = [position for position in range(14) if position not in (3, 10)]
    expected = [[0, 1], *([1, 2],) * 2, *([3, 4],) * 3, *([4, 5],) * 3, [6, 7], [7, 8], [0, 0]]
    assert whole.offsets[letters].tolist() == expected
    assert whole.offsets[3, 0] == whole.offsets[3, 1]  # a blank
    (cut,) = TokenReader(tokenizer).read(["né 日本 ab"], max_length=4)
    kept = whole.offsets[:3] if side == "right" else whole.offsets[10:13]
    assert cut.offsets.tolist() == [*kept.tolist(), [0, 0]]


def test_lines_without_words_are_refused() -> None:
    with pytest.raises(DataError, match="no word"):
        measure_alignment(tiny_models.tokenizer(), ["  "])
