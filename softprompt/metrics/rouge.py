"""ROUGE (Lin 2004, W04-1013), with words of any script."""

import functools
import unicodedata
from collections.abc import Callable, Sequence

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import Score, fmeasure

from softprompt.errors import UserError
from softprompt.metrics.pairs import References, pairs
from softprompt.metrics.scores import Scores, mean_of
from softprompt.metrics.subsequences import lcs_length, summary_hits
from softprompt.runtime.progress import Progress, silent

MOST_WORDS = 50_000  # of a text, for the longest common subsequence
_MOST_LINE_STEPS = 10_000_000  # of ROUGE-Lsum, which compares every line with every line
_LONGEST_STEM = 100  # letters; longer words are not English, and the stemmer is slow on them

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
      stem: whether to stem words of 4 to 100 letters (Porter stemmer, English).
    """

    def __init__(self, stem: bool = False):
        self._stem: Callable[[str], str] | None = PorterStemmer().stem if stem else None

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        words: list[str] = _WORD.findall(unicodedata.normalize("NFC", text).lower())
        if self._stem is None:
            return words
        return [self._stem(w) if 3 < len(w) <= _LONGEST_STEM else w for w in words]


def rouge(
    predictions: Sequence[str],
    references: References,
    types: Sequence[str],
    stem: bool = False,
    progress: Progress = silent,
) -> Scores:
    """Compute ROUGE; the values are those of the package rouge-score.

    Args:
      predictions, references: N each.
      types: `rouge1`, `rouge2`, ... for n-grams, `rougeL` for the longest common
        subsequence, `rougeLsum` for the longest common subsequence line by line.
      stem: see `UnicodeTokenizer`.
      progress: shows how many predictions are done.

    Returns:
      `<type>.precision`, `.recall` and `.f1` from 0 to 1, as means over examples. With
      several references, the one with the highest F1 counts.

    Raises:
      UserError: if a text is too long. `rougeL` and `rougeLsum` accept 50,000 words, because
        their time grows with the product of the two lengths.
    """
    tokenizer = UnicodeTokenizer(stem)
    of_ngrams = [kind for kind in types if kind not in _BY_SUBSEQUENCE]
    scorer = RougeScorer(of_ngrams, tokenizer=tokenizer)
    names = [f"{kind}.{part}" for kind in types for part in ("precision", "recall", "f1")]
    rows = []
    label = types[0] if len(types) == 1 else "rouge"
    for number, prediction, texts in pairs(label, predictions, references, progress):
        found = [scorer.score(text, prediction) if of_ngrams else {} for text in texts]
        for kind in _BY_SUBSEQUENCE:
            if kind in types:
                compare = functools.partial(_BY_SUBSEQUENCE[kind], tokenizer.tokenize)
                for scores, text in zip(found, texts, strict=True):
                    try:
                        scores[kind] = compare(text, prediction)
                    except _TooLong as error:
                        raise UserError(f"metric {kind}: prediction {number}: {error}") from None
        best = [max((each[kind] for each in found), key=lambda s: s.fmeasure) for kind in types]
        rows.append([value for score in best for value in score])
    return mean_of(names, rows)


class _TooLong(Exception):
    """A text is too long. The caller adds the metric and the number of the text."""


Tokenize = Callable[[str], list[str]]


def _rouge_l(tokenize: Tokenize, reference: str, prediction: str) -> Score:
    texts = tokenize(reference), tokenize(prediction)
    _require_few_words(*map(len, texts))
    return _score(lcs_length(*texts), *map(len, texts))


def _rouge_lsum(tokenize: Tokenize, reference: str, prediction: str) -> Score:
    ours, theirs = (
        [tokenize(line) for line in text.split("\n") if line] for text in (reference, prediction)
    )
    wanted, given = sum(map(len, ours)), sum(map(len, theirs))
    _require_few_words(wanted, given)
    if len(ours) * given + len(theirs) * wanted > _MOST_LINE_STEPS:
        raise _TooLong(
            f"{len(ours)} lines of the reference and {len(theirs)} of the prediction are too many "
            "to compare every line with every line"
        )
    return _score(summary_hits(ours, theirs), wanted, given)


_BY_SUBSEQUENCE = {"rougeL": _rouge_l, "rougeLsum": _rouge_lsum}


def _require_few_words(wanted: int, given: int) -> None:
    if max(wanted, given) > MOST_WORDS:
        raise _TooLong(
            f"the reference has {wanted:,} words and the prediction {given:,}; "
            f"at most {MOST_WORDS:,} are supported"
        )


def _score(hits: int, wanted: int, given: int) -> Score:
    """Return the score for words in common, words of the reference and of the prediction."""
    if not wanted or not given:
        return Score(precision=0, recall=0, fmeasure=0)
    precision, recall = hits / given, hits / wanted
    return Score(precision=precision, recall=recall, fmeasure=fmeasure(precision, recall))
