"""Objectives in experiments: their settings, their data, and small runs."""

import json

import numpy as np
import pytest
from conftest import GOLDEN, example_of

from softprompt import TrainingBatches, UserError, load_experiment, make_task, train
from softprompt.data.examples import Example
from softprompt.data.preferences import preference_examples
from softprompt.data.records import Record
from softprompt.data.teacher import same_rows, teacher_text
from softprompt.data.weights import example_weights
from softprompt.experiment.objective_settings import TeacherSettings
from softprompt.experiment.reading import dump_experiment
from softprompt.experiment.schema import TemplateSettings

EXPERIMENT = f"""\
base: {GOLDEN / "llama-grouped"}
data: {{train: train.jsonl, validation: validation.jsonl, test: validation.jsonl}}
template: {{input: "Say {{record[prompt]}}:", target: " {{chosen}}"}}
prompt: {{length: 3}}
optimizer: {{learning_rate: 0.1}}
training: {{steps: 12, batch_size: 4, log_every: 1}}
evaluation: {{every: 12, samples: 0}}
"""
PAIRS = [
    {"prompt": letter, "chosen": letter.upper() * 2, "rejected": "no", "weight": number % 3}
    for number, letter in enumerate("abcdefghijkl")
]


@pytest.fixture
def path(tmp_path):
    for split in ("train", "validation"):
        lines = [json.dumps(pair) + "\n" for pair in PAIRS]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    path = tmp_path / "case.yaml"
    path.write_text(EXPERIMENT)
    return path


def with_objective(path, text: str, *overrides: str):
    path.write_text(f"{EXPERIMENT}objective: {text}\n")
    return load_experiment(path, overrides)


def records_of(folder, split: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["split"] == split]


def test_the_name_alone_stands_for_a_section_with_its_defaults(path):
    short, long = (
        with_objective(path, text) for text in ("preference", "{name: preference, beta: 0.1}")
    )
    assert short == long
    assert (short.objective.loss, short.evaluation.metric) == ("dpo", "objective_loss")
    changed = with_objective(path, "preference", "objective.loss=normalized")
    assert (changed.objective.loss, changed.objective.beta) == ("normalized", 5.0)


@pytest.mark.parametrize(
    ("template", "target"),
    [
        ("{}", "{chosen}"),
        ('{input: "Question: {record[prompt]} Answer:"}', " {chosen}"),
        ('{input: "Question: {record[prompt]} Answer: "}', "{chosen}"),
        ('{input: "{record[prompt]}"}', "{chosen}"),
        ('{input: "Sum up {text} briefly.", chat: true}', "{chosen}"),
        ('{input: "{text}:", target: "<{chosen}>"}', "<{chosen}>"),
    ],
)
def test_the_target_is_the_chosen_answer_unless_the_file_names_another(path, template, target):
    path.write_text(
        f"base: tiny\ndata: {{train: a.jsonl, validation: b.jsonl}}\ntraining: {{steps: 1}}\n"
        f"objective: preference\ntemplate: {template}\n"
    )
    assert load_experiment(path).template.target == target


@pytest.mark.parametrize(
    "text",
    [
        "preference",
        "{name: preference, loss: ipo, beta: 0.3}",
        "{label_smoothing: 0.1, weights: weight}",
        "{name: distill, temperature: 2.0, teacher: {context: manual.txt}}",
    ],
)
def test_an_experiment_is_written_and_read_back_with_its_objective(path, text, tmp_path):
    experiment = with_objective(path, text)
    again = tmp_path / "runs" / "config.yaml"
    again.parent.mkdir()
    again.write_text(dump_experiment(experiment, again.parent))
    assert load_experiment(again) == experiment


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("{beta: 0.2}", [], "objective: beta belongs to preference, not to cross_entropy"),
        ("{name: preference, weights: w}", [], "weights belongs to cross_entropy"),
        ("distill", [], "objective: distill needs a teacher"),
        (
            "{name: distill, teacher: {}}",
            [],
            "objective.teacher: set context, shots, input, run or base",
        ),
        ("{name: distill, teacher: {run: a, shots: 2}}", [], "remove shots or run"),
        ("{name: distill, teacher: {input: a}}", [], "objective.teacher.input: has no {field}"),
        (
            "preference",
            ["method=full"],
            "needs the unchanged base model; choose another method than full",
        ),
        ("preference", ["template.target='{answer}'"], "from the fields chosen and rejected"),
        ("preference", ["verbalizer={a: a, b: b}"], "learns from free text"),
        ("cross_entropy", ["evaluation.metric=kl"], "kl needs objective: preference"),
        ("preference", ["evaluation.metric=agreement"], "agreement needs objective: distill"),
    ],
)
def test_settings_that_do_not_fit_are_rejected_in_one_line(path, text, overrides, message):
    with pytest.raises(UserError) as error:
        with_objective(path, text, *overrides)
    (line,) = str(error.value).splitlines()
    assert message in line


TEMPLATE = TemplateSettings(input="Say {record[prompt]}:", target=" {chosen}")


def encoded(tiny, records, template=TEMPLATE) -> list[Example]:
    task = make_task(tiny, template, None, virtual_tokens=2)
    return list(preference_examples(task, records))


def test_an_example_has_the_chosen_answer_before_the_rejected_one(tiny):
    (example,) = encoded(tiny, [{"prompt": "ab", "chosen": "yes", "rejected": "no!"}])
    end = [tiny.tokenizer.eos_token_id]

    def ids(text):
        return tiny.tokenizer(text, add_special_tokens=False).input_ids

    assert example.input[-3:] == ids("ab:")
    assert example.candidates == [[*ids(" yes"), *end], [*ids(" no!"), *end]]
    assert example.answer == 0


def test_a_truncated_input_leaves_room_for_the_longer_answer(tiny):
    template = TEMPLATE.model_copy(update={"max_tokens": 30})
    pair = {"prompt": "a" * 50, "chosen": "b" * 4, "rejected": "c" * 12}
    swapped = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    one, other = encoded(tiny, [pair, swapped], template)
    assert one.truncated
    assert one.input == other.input
    assert len(one.input) + max(map(len, one.candidates)) == 30


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_pair_without_a_field_is_reported_with_its_row(tiny, field):
    pair = {key: value for key, value in PAIRS[1].items() if key != field}
    with pytest.raises(UserError, match=f"row 1: no field '{field}'"):
        encoded(tiny, [PAIRS[0], pair])


def test_batches_keep_both_candidates_and_the_weights(tiny):
    examples = encoded(tiny, PAIRS)
    weights = np.arange(12, dtype=np.float32)
    batches = TrainingBatches(examples, 4, seed=0, weights=weights, all_candidates=True)
    lengths = [sum(map(len, example.candidates)) for example in examples]
    for number in range(3):
        batch = batches[number]
        assert batch.segments.max() == 2
        assert {0, 1} <= set(batch.target_candidates.ravel().tolist())
        for length, weight in zip(batch.target_lengths[0], batch.weights[0], strict=True):
            assert length == lengths[int(weight)]
    assert batches.largest().weights.shape == batches.largest().lengths.shape


def weighted(*values) -> list[Example]:
    example = example_of([5], [[6]], 0)
    return [
        Example(example.input, example.candidates, 0, Record({"w": value}, f"data:{number}"), False)
        for number, value in enumerate(values, 1)
    ]


def test_weights_are_numbers_or_numbers_written_as_text():
    np.testing.assert_array_equal(example_weights(weighted(0, 1.5, "2"), "w"), [0, 1.5, 2])


@pytest.mark.parametrize("value", [-1, "heavy", True, "nan", "inf", 1e40])
def test_other_weights_are_rejected_with_their_record(value):
    with pytest.raises(UserError, match=r"data:2: field 'w' is .*a number of at least 0"):
        example_weights(weighted(1, value), "w")


def test_weights_that_are_all_zero_are_rejected():
    with pytest.raises(UserError, match="field 'w' is 0 in all training records"):
        example_weights(weighted(0, 0.0), "w")


def text_of(tiny, template, task_virtual=2, **settings):
    """What a teacher reads, and the task of the student."""
    task = make_task(tiny, template, None, virtual_tokens=task_virtual)
    records = [Record({"prompt": "q", "chosen": "r"}, "row")] * 3
    teacher = TeacherSettings(**settings)
    return teacher_text(teacher, tiny, template, None, records, 0, task), task


def test_the_teacher_reads_its_context_in_the_place_of_the_virtual_tokens(tiny, tmp_path):
    manual = tmp_path / "manual.txt"
    manual.write_text("Read me.\n")
    template = TemplateSettings(input="{prompt}Say {record[prompt]}:", target=" {chosen}")
    text, task = text_of(tiny, template, context=str(manual))
    begin = tiny.tokenizer("a").input_ids[:-1]
    assert text.first == [*begin, *tiny.tokenizer("Read me.\n", add_special_tokens=False).input_ids]
    assert task.opening == [*begin, ~0, ~1]
    assert same_rows(text.task.pieces, task)


def test_the_teacher_reads_solved_examples(tiny):
    text, _ = text_of(tiny, TEMPLATE, shots=2)
    assert tiny.tokenizer.decode(text.first, skip_special_tokens=True) == "Say q: r\n\n" * 2


def test_a_context_after_a_field_is_rejected(tiny, tmp_path):
    manual = tmp_path / "manual.txt"
    manual.write_text("Read me.")
    template = TemplateSettings(input="Say {record[prompt]}: {prompt}", target=" {chosen}")
    with pytest.raises(UserError, match=r"put \{prompt\} before the first field"):
        text_of(tiny, template, 0, context=str(manual))


@pytest.mark.parametrize("virtual", [0, 2])
def test_special_tokens_come_once_in_rows_of_the_teacher_alone(tiny, tmp_path, virtual):
    """The teacher's text begins with them, so its own rows do not."""
    manual = tmp_path / "manual.txt"
    manual.write_text("Read me.")
    text, task = text_of(
        tiny, TEMPLATE, virtual, context=str(manual), input="{record[prompt]} Repeat it:"
    )
    begin = tiny.tokenizer("a").input_ids[:-1]
    example = text.task.example(Record({"prompt": "q", "chosen": "r"}, "row"))
    assert not same_rows(text.task.pieces, task)
    whole = [*text.first, *example.input]
    assert tiny.tokenizer.decode(whole[len(begin) :]) == "Read me.q Repeat it:"
    assert whole[: len(begin)] == begin


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no text"), ("a" * 5000, "context window of .* too short"), (None, "no such file")],
)
def test_a_context_that_cannot_be_read_is_rejected(tiny, tmp_path, content, message):
    manual = tmp_path / "manual.txt"
    if content is not None:
        manual.write_text(content)
    with pytest.raises(UserError, match=message):
        text_of(tiny, TEMPLATE, context=str(manual))


def test_preferences_are_learned(path, tmp_path):
    summary = train(with_objective(path, "preference"), tmp_path / "run")
    losses = [record["loss"] for record in records_of(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.05
    assert summary["test"]["preference_accuracy"] == 1
    assert summary["test"] == pytest.approx(summary["validation"], rel=1e-4)
    low, high = summary["test_intervals"]["objective_loss"]
    assert low < summary["test"]["objective_loss"] < high


def test_a_distilled_prompt_approaches_its_teacher(path, tmp_path):
    (tmp_path / "manual.txt").write_text("The answer is yes. Always yes, yes and yes.")
    objective = "{name: distill, teacher: {context: manual.txt}}"
    template = "template.input='Say {rejected}:'"
    summary = train(with_objective(path, objective, template), tmp_path / "run")
    losses = [record["loss"] for record in records_of(tmp_path / "run", "train")]
    assert losses[-1] < 0.8 * losses[0]
    assert summary["test"] == pytest.approx(summary["validation"], rel=1e-4)
    assert summary["validation"]["objective_loss"] < 0.8 * losses[0]


def test_records_of_weight_0_are_not_learned(path, tmp_path):
    """The rows of weight 0 have other targets, which do not change the run."""
    objective, template = "{weights: weight}", "template.input='Say {rejected}:'"
    experiment = with_objective(path, objective, template)
    changed = [p if p["weight"] else {**p, "chosen": p["chosen"].lower()} for p in PAIRS]
    losses = []
    for name, rows in (("one", PAIRS), ("other", changed)):
        train(experiment, tmp_path / name, records={"train": rows})
        losses.append([record["loss"] for record in records_of(tmp_path / name, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
