"""Metrics of free text. A reference is a text, or a list of texts of which any will do."""

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

# Ideographs and kana are words of their own; elsewhere a word is letters, marks and digits.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{M}\p{N}--[\p{Han}\p{Hiragana}\p{Katakana}]]+",
    regex.V1,
)


class UnicodeTokenizer:
    """Words of any script, lower-cased, for ROUGE.

    On English it does what rouge-score's own tokenizer does, which takes all letters but
    a to z for spaces.

    Args:
      stem: whether words of more than three letters lose their ending (Porter's, English).
    """

    def __init__(self, stem: bool = False):
        self._stem: Callable[[str], str] | None = PorterStemmer().stem if stem else None

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        words: list[str] = _WORD.findall(unicodedata.normalize("NFC", text).lower())
        if self._stem is None:
            return words
        return [self._stem(word) if len(word) > 3 else word for word in words]


def rouge(
    predictions: Sequence[str], references: References, types: Sequence[str], stem: bool = False
) -> Scores:
    """ROUGE (Lin 2004, W04-1013), by the package rouge-score; the mean over examples.

    Args:
      predictions, references: N each.
      types: `rouge1`, `rouge2`, … of n-grams, `rougeL` of longest common subsequences,
        `rougeLsum` of these line by line.
      stem: see `UnicodeTokenizer`.

    Returns:
      `<type>.precision`, `.recall` and `.f1`, from 0 to 1. Of several references the one
      of the highest F1 counts.
    """
    scorer = RougeScorer(list(types), tokenizer=UnicodeTokenizer(stem))
    names = [f"{kind}.{part}" for kind in types for part in ("precision", "recall", "f1")]
    rows = []
    for prediction, reference in zip(predictions, _lists(references), strict=True):
        scores = scorer.score_multi(reference, prediction)
        rows.append([value for kind in types for value in scores[kind]])
    return mean_of(names, rows)


def bleu(predictions: Sequence[str], references: References) -> Scores:
    """BLEU (Papineni et al. 2002, P02-1040), by sacrebleu; from 0 to 100.

    Where no text of a corpus is long enough for 4-grams, the longest n-grams it has count.
    """
    return _by_sacrebleu("bleu", BLEU(effective_order=True), predictions, references)


def chrf(predictions: Sequence[str], references: References) -> Scores:
    """The F-score chrF2 of character n-grams (Popović 2015, W15-3049), by sacrebleu; 0 to 100."""
    return _by_sacrebleu("chrf", CHRF(), predictions, references)


def ter(predictions: Sequence[str], references: References) -> Scores:
    """The translation edit rate (Snover et al. 2006), by sacrebleu, in percent; 0 is best."""
    return _by_sacrebleu("ter", TER(), predictions, references)


def exact_match(predictions: Sequence[str], references: References) -> Scores:
    """The share of predictions equal to a reference, by SQuAD's rules (arXiv:1606.05250).

    Case, punctuation, English articles and white space do not count.
    """
    return _best_of("exact_match", predictions, references, lambda p, r: float(p == r))


def token_f1(predictions: Sequence[str], references: References) -> Scores:
    """The mean F1 of words shared with a reference, by SQuAD's rules, see `exact_match`."""
    return _best_of("token_f1", predictions, references, _word_f1)


def _lists(references: References) -> list[list[str]]:
    return [[each] if isinstance(each, str) else list(each) for each in references]


def _by_sacrebleu(
    name: str, metric: BLEU | CHRF | TER, predictions: Sequence[str], references: References
) -> Scores:
    """Counts of every example, and its formula over their sum.

    The two methods are those that each metric of sacrebleu is made of; its public ones give
    no counts to resample.
    """
    listed = _lists(references)
    most = max(map(len, listed))
    streams: Any = [[each[i] if i < len(each) else None for each in listed] for i in range(most)]
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
