"""Metrics compared with their reference packages, scikit-learn and plain arithmetic."""

import time
import tracemalloc

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from rouge_score import rouge_scorer
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER

from softprompt import UserError
from softprompt.experiment.metric_names import metric_values
from softprompt.metrics.labels import confusion_rows, label_scores
from softprompt.metrics.named import measure
from softprompt.metrics.rouge import UnicodeTokenizer, rouge
from softprompt.metrics.scores import mean_of, paired_test
from softprompt.metrics.subsequences import lcs_indices, lcs_length, summary_hits

TEXT = "the a cat dogs was running quickly over under houses, small Tree isn't 42 well-known"
WORDS = TEXT.split()


def sentences(seed, count=40, max_words=14):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, max_words))) for _ in range(count)]


PREDICTIONS, REFERENCES = sentences(0), sentences(1)


def values(name, predictions, references, **options):
    return measure([name], predictions, references, **options)[name].values()


def test_rouge_of_a_known_pair():
    found = values("rouge", ["that too is a test"], ["this is a test"])
    expected = {
        **{"rouge1.precision": 3 / 5, "rouge1.recall": 3 / 4, "rouge1.f1": 2 / 3},
        **{"rouge2.precision": 2 / 4, "rouge2.recall": 2 / 3, "rouge2.f1": 4 / 7},
        **{"rougeL.precision": 3 / 5, "rougeL.recall": 3 / 4, "rougeL.f1": 2 / 3},
        **{"rougeLsum.precision": 3 / 5, "rougeLsum.recall": 3 / 4, "rougeLsum.f1": 2 / 3},
    }
    assert found == pytest.approx(expected)
    assert list(found) == metric_values("rouge")


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_of_english_matches_the_reference_implementation(stem):
    lines = [f"{a}\n{b}" for a, b in zip(PREDICTIONS, sentences(2), strict=True)]
    scorer = RougeScorer(["rouge1", "rouge3", "rougeL", "rougeLsum"], use_stemmer=stem)
    each = [scorer.score(r, p) for p, r in zip(lines, REFERENCES, strict=True)]
    for name in ("rouge1", "rouge3", "rougeL", "rougeLsum"):
        found = values(name, lines, REFERENCES, stem=stem)
        expected = np.mean([score[name] for score in each], axis=0)
        np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)
    assert values("rouge1", ["running"], ["runs"], stem=True)["rouge1.f1"] == 1


@pytest.mark.parametrize("words", [2, 3, 10])
def test_longest_common_subsequences_are_those_of_the_reference_implementation(words):
    random = np.random.default_rng(words)

    def text(most):
        return random.integers(0, words, random.integers(0, most)).astype(str).tolist()

    for _ in range(200):
        reference, prediction = text(40), text(40)
        assert (
            lcs_length(reference, prediction)
            == (rouge_scorer._lcs_table(reference, prediction)[-1][-1])
        )
        assert lcs_indices(reference, prediction)[::-1] == (
            rouge_scorer.lcs_ind(reference, prediction)
        )
        lines = [text(7) for _ in range(5)], [text(7) for _ in range(4)]
        expected = rouge_scorer._summary_level_lcs(*lines).recall
        total = sum(map(len, lines[0])) or 1
        assert summary_hits(*lines) / total == expected


def test_rouge_of_very_long_texts_takes_little_time_and_memory():
    """A table of 20,000 by 20,000 cells would take 3 GB and minutes."""
    random = np.random.default_rng(0)
    one, other = (" ".join(map(str, random.integers(0, 500, 20_000))) for _ in range(2))
    tracemalloc.start()
    began = time.monotonic()
    rouge([one], [other], ["rougeL", "rougeLsum"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - began < 20
    assert peak < 300e6


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ter", "a " * 501, "metric ter: prediction 2 or its reference has 501 words; at most 500"),
        ("rougeL", "a " * 50_001, "metric rougeL: prediction 2: the reference has 1 words and"),
        ("rougeLsum", "a\n" * 5000, "5000 lines of the reference and 5000 of the prediction"),
        ("bleu", "a" * 500_001, "has 500,001 characters; at most 500,000 are supported"),
    ],
)
def test_texts_that_would_take_long_are_refused(name, text, message):
    reference = text if name == "rougeLsum" else "a"
    with pytest.raises(UserError, match=message) as raised:
        measure([name], ["a", text], ["a", reference])
    assert "\n" not in str(raised.value)


def test_words_too_long_for_the_stemmer_are_kept():
    """The stemmer's time grows with the square of a run of the letter y."""
    assert UnicodeTokenizer(stem=True).tokenize("y" * 100_000 + "ing running") == [
        "y" * 100_000 + "ing",
        "run",
    ]


def test_progress_is_shown_for_every_metric_of_texts():
    done = []

    class Bar:
        def __init__(self, label, total, unit, **rest):
            self.label = label
            done.append([label, total, unit, 0])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def advance(self, count=1, note=""):
            done[-1][-1] += count

    measure(["rouge", "ter", "accuracy", "token_f1"], ["a"] * 3, ["b"] * 3, progress=Bar)
    assert done == [[name, 3, "texts", 3] for name in ("rouge", "ter", "token_f1")]


def test_the_confusion_matrix_is_a_table_with_a_row_per_reference():
    scores = measure(["confusion"], ["a.b", "c", "c", ""], ["a.b", "a.b", "c", "c"])["confusion"]
    assert confusion_rows(scores.values()) == [
        {"reference \\ prediction": "", "": 0, "a.b": 0, "c": 0},
        {"reference \\ prediction": "a.b", "": 0, "a.b": 1, "c": 1},
        {"reference \\ prediction": "c", "": 1, "a.b": 0, "c": 1},
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Съешь ещё, этих булок", ["съешь", "ещё", "этих", "булок"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("你好 world 2", ["你", "好", "world", "2"]),
        ("3つのTシャツabc", ["3", "つ", "の", "t", "シ", "ャ", "ツ", "abc"]),
        ("Cafe\u0301 d'été", ["café", "d", "été"]),
        ("snake_case", ["snake", "case"]),
    ],
)
def test_words_of_any_script_are_counted(text, words):
    assert UnicodeTokenizer().tokenize(text) == words
    assert rouge([text], [text], ["rouge1"]).values()["rouge1.f1"] == 1


def test_the_best_of_several_references_counts():
    found = measure(
        ["rouge1", "exact_match", "token_f1"], ["a b c"], [["x y", "a b d", "The A, b c!"]]
    )
    assert found["rouge1"].values()["rouge1.f1"] == pytest.approx(6 / 7)
    assert found["exact_match"].values() == {"exact_match": 1}
    assert found["token_f1"].values() == {"token_f1": 1}


@pytest.mark.parametrize(
    ("name", "metric"), [("bleu", BLEU(effective_order=True)), ("chrf", CHRF()), ("ter", TER())]
)
def test_corpus_metrics_match_sacrebleu(name, metric):
    pairs = zip(REFERENCES, sentences(3), strict=True)
    several = [[r, o] if i % 2 else [r] for i, (r, o) in enumerate(pairs)]
    scores = measure([name], PREDICTIONS, several)[name]
    streams = [[r[0] for r in several], [r[1] if len(r) > 1 else None for r in several]]
    expected = metric.corpus_score(PREDICTIONS, streams)
    assert scores.values()[name] == pytest.approx(expected.score, rel=1e-12)
    assert scores.signature == str(metric.get_signature())
    for found, prediction, references in zip(scores.each(), PREDICTIONS, several, strict=True):
        alone = metric.sentence_score(prediction, references).score
        assert found[name] == pytest.approx(alone, rel=1e-12)


def test_bleu_of_a_corpus_matches_sacrebleu_with_default_settings():
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert values("bleu", PREDICTIONS, REFERENCES)["bleu"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["this is a test", "one word", "x", "eine längere Zeile, mit Komma"]
)
def test_bleu_is_100_for_identical_and_0_for_disjoint_texts(text):
    assert values("bleu", [text], [text])["bleu"] == pytest.approx(100)
    assert values("bleu", [text], ["nothing of it whatsoever here"])["bleu"] == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("tower of Eiffel", "Eiffel Tower", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("Paris", "London", 0, 0),
        ("", "London", 0, 0),
        ("the", "a", 1, 1),
        ("well-known", "wellknown", 1, 1),
        ("b b c", "b c c", 0, 2 / 3),
    ],
)
def test_exact_match_and_token_f1_follow_squad(prediction, reference, exact, f1):
    assert values("exact_match", [prediction], [reference])["exact_match"] == exact
    assert values("token_f1", [prediction], [reference])["token_f1"] == pytest.approx(f1)


def test_metrics_of_labels_match_scikit_learn():
    random = np.random.default_rng(0)
    references = random.choice(["a", "b", "c"], 200, p=[0.6, 0.3, 0.1]).tolist()
    predictions = [
        r if random.random() < 0.6 else str(random.choice(["a", "b", "d"])) for r in references
    ]
    found = {}
    for name in ("accuracy", "precision", "recall", "macro_f1", "micro_f1", "matthews"):
        found |= values(name, predictions, references)
    arguments = {"zero_division": 0}
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(references, predictions),
        "precision": sklearn.metrics.precision_score(
            references, predictions, average="macro", **arguments
        ),
        "recall": sklearn.metrics.recall_score(
            references, predictions, average="macro", **arguments
        ),
        "macro_f1": sklearn.metrics.f1_score(references, predictions, average="macro"),
        "micro_f1": sklearn.metrics.f1_score(references, predictions, average="micro"),
        "matthews": sklearn.metrics.matthews_corrcoef(references, predictions),
    }
    assert found == pytest.approx(expected)
    table = sklearn.metrics.confusion_matrix(references, predictions)
    confusion = values("confusion", predictions, references)
    assert list(confusion.values()) == table.reshape(-1).tolist()
    assert confusion["confusion.c.d"] == table[2, 3]


def test_thousands_of_labels_are_counted_or_rejected():
    texts = [str(i) for i in range(5000)]
    assert values("accuracy", texts, texts[:2500] + texts[:2500]) == {"accuracy": 0.5}
    with pytest.raises(UserError, match="5000 different labels; is this free text"):
        measure(["macro_f1"], texts, texts)
    with pytest.raises(UserError, match="101 different labels"):
        measure(["confusion"], texts[:101], texts[:101])
    labels = [str(i % 1000) for i in range(500_000)]
    shifted = [str((i // 1000) % 1000) for i in range(500_000)]
    with pytest.raises(UserError, match="need too much memory"):
        measure(["macro_f1"], labels, shifted)


def test_matthews_of_constant_predictions_is_zero():
    assert label_scores("matthews", ["a", "a"], ["a", "b"]).values() == {"matthews": 0}


@pytest.mark.parametrize("name", ["rouge1", "bleu", "chrf", "ter", "macro_f1"])
def test_resampled_statistics_give_the_values_of_the_resampled_texts(name):
    """The bootstrap relies on this: the sum of the statistics represents the examples."""
    labels = name == "macro_f1"
    predictions = [text[0] for text in PREDICTIONS] if labels else PREDICTIONS
    references = [text[0] for text in REFERENCES] if labels else REFERENCES
    scores = measure([name], predictions, references)[name]
    drawn = np.random.default_rng(0).integers(0, 40, 40)
    total = scores.statistics[drawn].sum(axis=0)
    again = values(name, [predictions[i] for i in drawn], [references[i] for i in drawn])
    if labels:  # the mean is over all labels, including labels that were not drawn
        names = sorted({*predictions, *references})
        expected = sklearn.metrics.f1_score(
            [references[i] for i in drawn],
            [predictions[i] for i in drawn],
            average="macro",
            labels=names,
            zero_division=0,
        )
        again = {name: expected}
    assert scores.combine(total, 40) == pytest.approx(again)


def test_the_interval_of_a_mean_is_close_to_the_theoretical_one():
    rows = np.random.default_rng(0).normal(5, 2, (400, 1))
    low, high = mean_of(["m"], rows.tolist()).intervals()["m"]
    half = 1.96 * rows.std() / np.sqrt(400)
    assert low == pytest.approx(rows.mean() - half, abs=0.04)
    assert high == pytest.approx(rows.mean() + half, abs=0.04)
    narrow = mean_of(["m"], rows.tolist()).intervals(level=0.5)["m"]
    assert low < narrow[0] < narrow[1] < high


def test_the_paired_test_distinguishes_a_difference_from_chance():
    random = np.random.default_rng(0)
    base = random.normal(0, 1, (200, 1))
    same = mean_of(["m"], base.tolist())
    assert paired_test(same, same)["m"].p_value == 1
    better = mean_of(["m"], (base + random.normal(0.5, 0.5, base.shape)).tolist())
    found = paired_test(better, same)["m"]
    assert found.difference == pytest.approx(0.5, abs=0.1)
    assert found.p_value == pytest.approx(1 / 1001)
    gains = (better.statistics - same.statistics)[:, 0]
    half = 1.96 * gains.std() / np.sqrt(200)
    assert found.interval == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.02)
    p_values = [
        paired_test(mean_of(["m"], random.normal(0, 1, (50, 1)).tolist()), null)["m"].p_value
        for null in [mean_of(["m"], random.normal(0, 1, (50, 1)).tolist()) for _ in range(100)]
    ]
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.08)


def test_the_paired_test_of_bleu_agrees_with_sacrebleu():
    from sacrebleu.significance import PairedTest

    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    others = [p if i % 3 else r for i, (p, r) in enumerate(pairs)]
    ours = measure(["bleu"], others, REFERENCES)["bleu"]
    theirs = measure(["bleu"], PREDICTIONS, REFERENCES)["bleu"]
    systems = [("base", PREDICTIONS), ("new", others)]
    metric = {"BLEU": BLEU(effective_order=True)}
    test = PairedTest(systems, metric, [REFERENCES], test_type="bs", n_samples=1000, n_jobs=1)
    expected = test()[1]["BLEU"][1].p_value
    assert paired_test(ours, theirs)["bleu"].p_value == pytest.approx(expected, abs=0.01)


def test_inputs_that_cannot_be_measured_are_rejected():
    with pytest.raises(UserError, match="no metric 'rogue'; known: rouge, bleu"):
        measure(["rogue"], ["a"], ["a"])
    with pytest.raises(UserError, match="'loss' needs a model"):
        measure(["loss"], ["a"], ["a"])
    with pytest.raises(UserError, match="one label, not a list"):
        measure(["accuracy"], ["a"], [["a", "b"]])
    one, two = mean_of(["m"], [[1.0]]), mean_of(["m"], [[1.0], [2.0]])
    with pytest.raises(UserError, match="not on 1 and 2"):
        paired_test(one, two)
