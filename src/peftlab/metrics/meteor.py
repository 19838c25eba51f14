"""METEOR 1.5 for English: words matched by form, stem, synonym and paraphrase, over the whole test set.

The score of the E2E challenge and of COCO: Stanford's tokenizer and METEOR's own program, both in Java, on lower-cased
words without punctuation. Where Java or the jars are missing, it is not computed, and the message says how to install
them. `meteor_wordnet` is another score that needs no Java; the two must not be compared.

Source: Denkowski and Lavie 2014; the jars are those of pycocoevalcap 1.2, as in tuetschek/e2e-metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from peftlab.meteor_jar import MeteorProgram, find_jars, split_by_stanford, summable
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import corpus_score, require_references

NAME = "meteor"
UNIT = "0-100"
HIGHER_IS_BETTER = True

SIGNATURE = "meteor:1.5|lang:en|norm|tok:stanford-ptb|case:lc|punctuation:no|refs:best|corpus"


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """METEOR 1.5 by its own program.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, an example has no reference, or the program failed.
        NotComputedError: Java or the jars are not installed.
    """
    require_references(NAME, predictions, examples)
    find_jars()
    sizes = [len(example.references) for example in examples]
    texts = split_by_stanford([*predictions, *(r for example in examples for r in example.references)])
    answers, others = texts[: len(predictions)], iter(texts[len(predictions) :])
    groups = [[next(others) for _ in range(size)] for size in sizes]
    with MeteorProgram() as program:
        found = [program.statistics(answer, group) for answer, group in zip(answers, groups, strict=True)]
        made = corpus_score(
            NAME,
            np.asarray([summable(row) for row in found]),
            lambda sums: 100 * program.value(sums.tolist()),
            unit=UNIT,
            higher_is_better=HIGHER_IS_BETTER,
            signature=SIGNATURE,
            seed=seed,
            examples=examples,
        )
    return replace(made, rows=None, value_of=None)  # the program that could score their sums has ended
