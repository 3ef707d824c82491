"""Metrics of free text.

A reference is a text, or a list of texts that are all correct.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER

from softprompt.metrics.scores import Scores, mean_of

References = Sequence[str | Sequence[str]]

# Every ideograph or kana is a word. Otherwise a word is a run of letters, marks and digits.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{M}\p{N}--[\p{Han}\p{Hiragana}\p{Katakana}]]+",
    regex.V1,
)


class UnicodeTokenizer:
    """Splits text of any script into lower-case words, for ROUGE.

    On English text the result is that of rouge-score's own tokenizer, which treats all
    letters except a to z as spaces.

    Args:
      stem: whether to stem words of more than three letters (Porter stemmer, English).
    """

    def __init__(self, stem: bool = False):
        self._stem: Callable[[str], str] | None = PorterStemmer().stem if stem else None

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        words: list[str] = _WORD.findall(unicodedata.normalize("NFC", text).lower())
        if self._stem is None:
            return words
        return [self._stem(word) if len(word) > 3 else word for word in words]


def rouge(
    predictions: Sequence[str], references: References, types: Sequence[str], stem: bool = False
) -> Scores:
    """Compute ROUGE (Lin 2004, W04-1013) with the package rouge-score.

    Args:
      predictions, references: N each.
      types: `rouge1`, `rouge2`, ... for n-grams, `rougeL` for the longest common
        subsequence, `rougeLsum` for the longest common subsequence line by line.
      stem: see `UnicodeTokenizer`.

    Returns:
      `<type>.precision`, `.recall` and `.f1` from 0 to 1, as means over examples. With
      several references, the one with the highest F1 counts.
    """
    scorer = RougeScorer(list(types), tokenizer=UnicodeTokenizer(stem))
    names = [f"{kind}.{part}" for kind in types for part in ("precision", "recall", "f1")]
    rows = []
    for prediction, reference in zip(predictions, _lists(references), strict=True):
        scores = scorer.score_multi(reference, prediction)
        rows.append([value for kind in types for value in scores[kind]])
    return mean_of(names, rows)


def bleu(predictions: Sequence[str], references: References) -> Scores:
    """Compute BLEU (Papineni et al. 2002, P02-1040) with sacrebleu, from 0 to 100.

    If no prediction has four words, the longest n-grams that occur are used instead.
    """
    return _by_sacrebleu("bleu", BLEU(effective_order=True), predictions, references)


def chrf(predictions: Sequence[str], references: References) -> Scores:
    """Compute the F-score chrF2 of character n-grams (Popović 2015, W15-3049), from 0 to 100."""
    return _by_sacrebleu("chrf", CHRF(), predictions, references)


def ter(predictions: Sequence[str], references: References) -> Scores:
    """Compute the translation edit rate (Snover et al. 2006) in percent; 0 is best."""
    return _by_sacrebleu("ter", TER(), predictions, references)


def exact_match(predictions: Sequence[str], references: References) -> Scores:
    """Compute the fraction of predictions that equal a reference (SQuAD, arXiv:1606.05250).

    Case, punctuation, English articles and white space are ignored.
    """
    return _best_of("exact_match", predictions, references, lambda p, r: float(p == r))


def token_f1(predictions: Sequence[str], references: References) -> Scores:
    """Compute the mean F1 of the words shared with a reference, normalized as in `exact_match`."""
    return _best_of("token_f1", predictions, references, _word_f1)


def _lists(references: References) -> list[list[str]]:
    """Return every reference as a list of texts."""
    return [[each] if isinstance(each, str) else list(each) for each in references]


def _by_sacrebleu(
    name: str, metric: BLEU | CHRF | TER, predictions: Sequence[str], references: References
) -> Scores:
    """Return the statistics of a metric of sacrebleu for every example, and its formula.

    The two private methods are the parts of every metric of sacrebleu. Its public methods do
    not return the statistics, which the bootstrap needs.
    """
    listed = _lists(references)
    count = max(map(len, listed))
    streams: Any = [[each[i] if i < len(each) else None for each in listed] for i in range(count)]
    statistics = metric._extract_corpus_statistics(list(predictions), streams)

    def combine(total: np.ndarray, count: int) -> dict[str, float]:
        return {name: float(metric._compute_score_from_stats(total.tolist()).score)}

    return Scores(np.array(statistics, np.float64), combine, str(metric.get_signature()))


def _best_of(
    name: str,
    predictions: Sequence[str],
    references: References,
    compare: Callable[[list[str], list[str]], float],
) -> Scores:
    """Return the mean over examples of the best comparison with a reference."""
    return mean_of(
        [name],
        [
            [max(compare(_squad_words(prediction), _squad_words(text)) for text in reference)]
            for prediction, reference in zip(predictions, _lists(references), strict=True)
        ],
    )


def _squad_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _word_f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    shared = collections.Counter(prediction) & collections.Counter(reference)
    return 2 * shared.total() / (len(prediction) + len(reference))
