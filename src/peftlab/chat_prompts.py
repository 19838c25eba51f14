"""Conversations as tokens, by the tokenizer's own chat template: the same for training and for asking (law 5)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from peftlab.errors import DataError

Messages = list[dict[str, str]]
_TRIAL = "Good."
_THOUGHT = "</think>"  # some templates leave out what the assistant thought
_TAKE = "give the tokenizer another template (tokenizer.chat_template, saved with the model):"


class ChatPrompts:
    """Writes prompts and answers as a tokenizer's chat template does.

    Args:
        tokenizer: A transformers tokenizer.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template, so nobody knows how it writes a conversation; take a model that was"
                " made for chat, set tokenizer.chat_template and save it with the model, or use the task 'jsonl' with"
                " prompts and completions"
            )
        self.tokenizer, self._is_tried = tokenizer, False

    def fit(self, source: str, room: int) -> tuple[list[int], bool]:
        """Prompt tokens of a conversation in a room.

        The oldest messages but the system's are left out first; then the end of the last message is cut.

        Args:
            source: The conversation so far as JSON, or the text of one message of the user.
            room: How many tokens there are.

        Returns:
            The tokens, and whether something was left out; ([], True) where not even the template fits.

        Raises:
            DataError: The template does not tell the assistant's turn, or cannot be filled.
        """
        messages = read_messages(source)
        if (
            not self._is_tried
        ):  # also where nothing is learnt: a model that is only asked must know whose turn it is
            self._after_prompt(messages, _TRIAL)
            self._is_tried = True
        ids = self._prompt_ids(messages)
        cut = False
        while len(ids) > room and (shorter := _without_oldest(messages)) is not None:
            messages, cut = shorter, True
            ids = self._prompt_ids(messages)
        if len(ids) <= room:
            return ids, cut
        last = messages[-1]["content"]
        low, high = -1, len(last)
        while low < high:  # the longest beginning of the last message that fits
            middle = (low + high + 1) // 2
            if len(self._prompt_ids(_ending(messages, last[:middle]))) <= room:
                low = middle
            else:
                high = middle - 1
        return ([], True) if low < 0 else (self._prompt_ids(_ending(messages, last[:low])), True)

    def answer_ids(self, source: str, answer: str) -> list[int]:
        """Tokens of an answer, up to the end of sequence.

        Args:
            source: The conversation before it.
            answer: What the assistant says.

        Returns:
            What the template writes after the prompt; the end of sequence closes it, also where the template has another
            mark for the end of a turn.

        Raises:
            DataError: The template writes the conversation otherwise once it is answered, does not tell the assistant's
                turn, or cannot be filled.
        """
        before, text = self._after_prompt(read_messages(source), answer)
        if not text.startswith(before):
            raise DataError(
                "the tokenizer's chat template writes a conversation otherwise once it is answered, so an answer cannot be"
                f" told from its prompt; {_TAKE} one whose prompt stays as it is"
            )
        prompt, whole = self._tokens(before), self._tokens(text)
        if whole[: len(prompt)] != prompt:  # a token would reach over the prompt's end, where asking stops
            whole = prompt + self._tokens(text[len(before) :])
        ids, end = whole[len(prompt) :], self.tokenizer.eos_token_id
        return ids[: ids.index(end) + 1] if end in ids else [*ids, end]

    def _after_prompt(self, messages: Messages, answer: str) -> tuple[str, str]:
        """A conversation where the assistant is asked, and where it has answered, after a look at whose turn it is.

        A template without an opening is one where the answer follows the question at once, as those of Llama 2 do.
        """
        before = self._written(messages, open_turn=True)
        text = self._written([*messages, {"role": "assistant", "content": answer}], open_turn=False)
        behind, said = text.removeprefix(before), answer.rpartition(_THOUGHT)[2].strip()
        if said not in behind:
            raise DataError(
                "the tokenizer's chat template does not write what the assistant says, so nothing could be learnt;"
                f" {_TAKE} one that writes every role"
            )
        is_opened = before != self._written(messages, open_turn=False)
        if not is_opened and text.startswith(before) and not behind.lstrip().startswith(said):
            opening = behind[: behind.index(said)]
            raise DataError(
                "the tokenizer's chat template does not open the assistant's turn when it is asked to"
                f" (add_generation_prompt), but writes {opening!r} before an answer: the model would learn to write that;"
                f" {_TAKE} one that has a generation prompt"
            )
        return before, text

    def _prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The conversation, and the opening of the assistant's turn."""
        return self._tokens(self._written(messages, open_turn=True))

    def _tokens(self, text: str) -> list[int]:
        """The tokens of what the template wrote, which holds the special ones already."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _written(self, messages: Sequence[dict[str, str]], *, open_turn: bool) -> str:
        """What the template writes; its own errors in words."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=open_turn, tokenize=False
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the tokenizer's chat template refuses the roles {roles}: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise DataError(
                f"the tokenizer's chat template cannot be filled ({type(error).__name__}: {error}); {_TAKE} a sound one"
            ) from error
        return text


def read_messages(source: str) -> Messages:
    """The messages of a source.

    Args:
        source: A list of messages as JSON; any other text is one message of the user.

    Returns:
        The messages.

    Example:
        >>> read_messages("Hello")
        [{'role': 'user', 'content': 'Hello'}]
    """
    try:
        found = json.loads(source)
    except ValueError:
        found = None
    listed = (
        isinstance(found, list)
        and found
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found)
    )
    return found if listed else [{"role": "user", "content": source}]


def _without_oldest(messages: Messages) -> Messages | None:
    """The conversation without its oldest question and answer; None where one message is left beside the system's."""
    start = 1 if messages[0]["role"] == "system" else 0
    if len(messages) - start < 2:
        return None
    rest = messages[start + 1 :]
    while len(rest) > 1 and rest[0]["role"] != "user":  # templates begin with the user
        rest = rest[1:]
    return messages[:start] + rest


def _ending(messages: Messages, content: str) -> Messages:
    """The conversation with another text in its last message."""
    return [*messages[:-1], {**messages[-1], "content": content}]
