"""METEOR by nltk and WordNet: words matched by form, stem and WordNet synonym, mean over examples.

The metric of 2005 to 2007 without paraphrases and without the weights of version 1.5, each sentence for itself. It is
another number than `meteor` (METEOR 1.5), mostly larger, and the two must not be compared. It needs no Java, but the data of
WordNet; without these it is not computed, and the message says how to install them.

Source: Banerjee and Lavie 2005; nltk/translate/meteor_score.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from peftlab.errors import NotComputedError
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references
from peftlab.word_splitting import split_like_mteval

NAME = "meteor_wordnet"
UNIT = "0-100"
HIGHER_IS_BETTER = True

INSTALL = "python -m nltk.downloader wordnet"


def open_wordnet() -> Any:
    """WordNet's data.

    Returns:
        nltk's reader of them.

    Raises:
        NotComputedError: nltk or the data are not installed; says how to install them.
    """
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except ImportError as error:
        raise NotComputedError(f"{NAME} needs nltk; install with: pip install nltk && {INSTALL}") from error
    except LookupError as error:
        raise NotComputedError(f"{NAME} needs the data of WordNet; install with: {INSTALL}") from error
    return wordnet


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean METEOR of sentences with the best reference, by nltk.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: nltk or the data of WordNet are not installed.
    """
    require_references(NAME, predictions, examples)
    wordnet = open_wordnet()
    from nltk.translate.meteor_score import meteor_score

    values = []
    for prediction, example in zip(predictions, examples, strict=True):
        references = [split_like_mteval(reference) for reference in example.references]
        values.append(100 * float(meteor_score(references, split_like_mteval(prediction), wordnet=wordnet)))
    signature = f"nltk:{version('nltk')}|wordnet|tok:13a|case:lc|refs:max|sentence|mean"
    return mean_score(
        NAME,
        values,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=signature,
        seed=seed,
        examples=examples,
    )
