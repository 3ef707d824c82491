"""Metrics of free text.

A reference is a text, or a list of texts that are all correct. ROUGE is in `rouge`.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER

from softprompt.metrics.pairs import References, pairs
from softprompt.metrics.scores import Scores, mean_of
from softprompt.runtime.progress import Progress, silent

MOST_TER_WORDS = 500  # sacrebleu's search for shifted words takes over 10 s for longer texts


def bleu(predictions: Sequence[str], references: References, progress: Progress = silent) -> Scores:
    """Compute BLEU (Papineni et al. 2002, P02-1040) with sacrebleu, from 0 to 100.

    If no prediction has four words, the longest n-grams that occur are used instead.
    """
    return _by_sacrebleu("bleu", BLEU(effective_order=True), predictions, references, progress)


def chrf(predictions: Sequence[str], references: References, progress: Progress = silent) -> Scores:
    """Compute the F-score chrF2 of character n-grams (Popović 2015, W15-3049), from 0 to 100."""
    return _by_sacrebleu("chrf", CHRF(), predictions, references, progress)


def ter(predictions: Sequence[str], references: References, progress: Progress = silent) -> Scores:
    """Compute the translation edit rate (Snover et al. 2006) in percent; 0 is best.

    Raises:
      UserError: if a text has more than 500 words.
    """
    return _by_sacrebleu("ter", TER(), predictions, references, progress, MOST_TER_WORDS)


def exact_match(
    predictions: Sequence[str], references: References, progress: Progress = silent
) -> Scores:
    """Compute the fraction of predictions that equal a reference (SQuAD, arXiv:1606.05250).

    Case, punctuation, English articles and white space are ignored.
    """
    return _best_of("exact_match", predictions, references, lambda p, r: float(p == r), progress)


def token_f1(
    predictions: Sequence[str], references: References, progress: Progress = silent
) -> Scores:
    """Compute the mean F1 of the words shared with a reference, normalized as in `exact_match`."""
    return _best_of("token_f1", predictions, references, _word_f1, progress)


def _by_sacrebleu(
    name: str,
    metric: BLEU | CHRF | TER,
    predictions: Sequence[str],
    references: References,
    progress: Progress,
    most_words: int | None = None,
) -> Scores:
    """Return the statistics of a metric of sacrebleu for every example, and its formula.

    The private methods are the parts of every metric of sacrebleu. Its public methods do not
    return the statistics, which the bootstrap needs, and keep the n-grams of all references in
    memory.
    """
    rows, counts = [], set()
    for _, prediction, texts in pairs(name, predictions, references, progress, most_words):
        wanted = metric._extract_reference_info([metric._preprocess_segment(t) for t in texts])
        given = metric._preprocess_segment(prediction)
        rows.append(metric._compute_segment_statistics(given, wanted))
        counts.add(len(texts))
    metric.num_refs = counts.pop() if len(counts) == 1 else -1  # for the signature

    def combine(total: np.ndarray, count: int) -> dict[str, float]:
        return {name: float(metric._compute_score_from_stats(total.tolist()).score)}

    return Scores(np.array(rows, np.float64), combine, str(metric.get_signature()))


def _best_of(
    name: str,
    predictions: Sequence[str],
    references: References,
    compare: Callable[[list[str], list[str]], float],
    progress: Progress,
) -> Scores:
    """Return the mean over examples of the best comparison with a reference."""
    rows = []
    for _, prediction, texts in pairs(name, predictions, references, progress):
        words = _squad_words(prediction)
        rows.append([max(compare(words, _squad_words(text)) for text in texts)])
    return mean_of([name], rows)


def _squad_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _word_f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    shared = collections.Counter(prediction) & collections.Counter(reference)
    return 2 * shared.total() / (len(prediction) + len(reference))
