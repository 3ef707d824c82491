"""The measurements: each starts a pair of workers, lets them take turns, and compares them."""

import json
import math
import statistics
import sys
import time
from pathlib import Path

from flops import Shapes, Step, prepended, required
from processes import Worker
from table import Operations, Row
from workload import Workload, random_rows

HERE = Path(__file__).parent
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative, of the first loss
INPUT, NEW = 32, 64  # tokens to read and to generate
ORDERS = "ours", "sorted", "random"
MATRIX_ROWS = 704  # the least number of rows of matrix products: 16 film reviews


class Pair:
    """Both workers of a case. `ours` and `theirs` run one command at a time.

    Args:
      folder: what `prepare.py` wrote.
      pythons: the interpreters of both workers.
      case: `method`, `virtual`, `rank` and `batch`, with the setting that `prepare.py` found.
    """

    def __init__(self, folder, pythons, case):
        self.case, self.folder = case, folder
        self.work = Workload(folder, case)
        self.first_step = []
        self.workers = [
            self._started(python, script, case)
            for python, script in zip(pythons, ("ours.py", "theirs.py"), strict=True)
        ]
        self.ours, self.theirs = self.workers

    def _started(self, python, script, case):
        """Start a worker, and train one step if the case is about training."""
        worker = Worker(python, HERE / script, self.folder, case, self.folder / f"{script}.log")
        if case["batch"]:
            worker("prepare_training")
            (loss,) = worker("steps", order="ours", numbers=[0])["losses"]
            seconds = time.perf_counter() - worker.began
            self.first_step.append((worker("used") if case["clock"] == "cpu" else seconds, loss))
        return worker

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.close()

    @property
    def name(self):
        """The case, for the table."""
        kind, virtual, rank = (self.case[key] for key in ("method", "virtual", "rank"))
        size = f"rank {rank}" if kind == "lora" else f"{virtual} virtual tokens"
        model = "" if self.case["model"] == "sentiment" else f"{self.case['model']}, "
        return f"{model}{kind}, {size}"


def training(pair, batches, rounds, unit):
    """Measure training steps. Each side trains on its own batches.

    Both train their first step on the same batch. After it, peft trains on batches sorted by length
    and on random batches.

    Args:
      pair: the workers, which have trained one step.
      batches: how many batches of typical sizes a round has.
      rounds: how often both sides train on each batch.
      unit: `examples/s`, or `tokens/s` for the tokens that have no padding.

    Returns:
      Rows of the table, and the `Operations` of a round.
    """
    (ours_first, loss), (theirs_first, their_loss) = pair.first_step
    difference = abs(loss / their_loss - 1)
    assert difference < TOLERANCE[pair.case["dtype"]], f"first losses {loss} and {their_loss}"
    name = f"{pair.name}, batch {pair.case['batch']}"
    losses = f"first losses {loss:.6f} and {their_loss:.6f}, {difference:.1e} apart"
    print(f"{name}: {losses}", file=sys.stderr)

    numbers = {order: pair.work.typical(order, batches) for order in ORDERS}
    mine = {"order": "ours", "numbers": numbers["ours"]}
    matrix_rows = max(MATRIX_ROWS, sum(length for length, _ in pair.work.lengths("ours", 0)))
    pair.ours("steps", **mine)  # compiles
    rows = [Row("first step after", name, "s", ours_first, theirs_first, False)]
    taken, rates = [], []
    for order in ("sorted", "random"):
        theirs = []
        for _ in range(rounds):
            taken.append(pair.ours("steps", **mine)["seconds"])
            theirs.append(pair.theirs("steps", order=order, numbers=numbers[order])["seconds"])
            rates.append([worker("rate", rows=matrix_rows) for worker in pair.workers])
        seconds = sum_of_medians(taken), sum_of_medians(theirs)
        amounts = (_amount(pair, unit, each, numbers[each]) for each in ("ours", order))
        speeds = [amount / each for amount, each in zip(amounts, seconds, strict=True)]
        memory = [worker("memory") / 1e9 for worker in pair.workers]
        rows += [
            Row(f"training, peft on {order} batches", name, unit, *speeds, True),
            Row(f"peak memory, peft on {order} batches", name, "GB", *memory, False),
        ]
    return rows, _operations(pair, name, numbers, sum_of_medians(taken), rates)


def sum_of_medians(rounds):
    """Return the seconds of all batches, each the median of its rounds."""
    return sum(map(statistics.median, zip(*rounds, strict=True)))


def _amount(pair, unit, order, numbers):
    if unit == "examples/s" and order != "ours":
        return len(numbers) * pair.case["batch"]
    tokens = sum(length for number in numbers for length, _ in pair.work.lengths(order, number))
    # The time of a step of ours depends on its tokens, and the measured batches may have fewer.
    return tokens / pair.work.mean_length() if unit == "examples/s" else tokens


def _operations(pair, name, numbers, seconds, rates):
    shapes = Shapes.of(json.loads((pair.folder / "base" / "config.json").read_text()))
    case = pair.case

    def total(count, order):
        steps = (
            Step(
                case["method"],
                case["virtual"],
                case["rank"],
                len(pair.work.opening),
                pair.work.lengths(order, number),
            )
            for number in numbers[order]
        )
        return sum(count(shapes, step) for step in steps)

    return Operations(
        name,
        total(required, "ours"),
        pair.ours("program_flops", numbers=numbers["ours"]),
        total(prepended, "sorted"),
        total(prepended, "random"),
        seconds,
        tuple(map(statistics.median, zip(*rates, strict=True))),
    )


def classification(pair, texts, single_texts, rounds):
    """Measure labeling many texts in batches of 32, and texts one by one."""
    for worker in pair.workers:
        worker("prepare_labels")
    inputs = pair.work.splits["test"]["inputs"]
    by_length = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    # Texts of all lengths, and texts of about the median length.
    step = len(by_length) // texts
    many = by_length[step // 2 :: step][:texts]
    middle = by_length[len(by_length) // 2 :][:single_texts]
    rows = []
    for numbers, size in ((many, 32), (middle, 1)):
        groups = [numbers] if size > 1 else [[number] for number in numbers]

        def turn(worker, groups=groups, size=size):
            answers = [
                worker("classify", split="test", numbers=group, batch_size=size) for group in groups
            ]
            odds = [odd for answer in answers for odd in answer["odds"]]
            return odds, [answer["seconds"] for answer in answers]

        odds, theirs = (turn(worker)[0] for worker in pair.workers)  # compiles
        allowed = 1e-3 if pair.case["dtype"] == "float32" else 0.5
        farthest = max(abs(a - b) for a, b in zip(odds, theirs, strict=True))
        assert farthest < allowed, f"the log-odds of the labels differ by {farthest}"
        taken = [[], []]
        for _ in range(rounds):
            for worker, values in zip(pair.workers, taken, strict=True):
                values += turn(worker)[1]
        ours, theirs = map(statistics.median, taken)
        if size > 1:
            speeds = len(numbers) / ours, len(numbers) / theirs
            rows.append(Row("classification", pair.name, "texts/s", *speeds, True))
        else:
            latency = 1e3 * ours, 1e3 * theirs
            rows.append(Row("classification of one text", pair.name, "ms", *latency, False))
    return rows


def generation(pair, batch, rounds):
    """Measure greedy generation, and require the same tokens in float32."""
    arguments = {"tokens": random_rows(batch, INPUT), "new": NEW}
    mine, other = (worker("generate", **arguments)["tokens"] for worker in pair.workers)
    different = [i for i in range(batch) if mine[i] != other[i]]
    assert pair.case["dtype"] != "float32" or not different, f"tokens of rows {different} differ"
    taken = [[], []]
    for _ in range(rounds):
        for worker, values in zip(pair.workers, taken, strict=True):
            values.append(batch * NEW / worker("generate", **arguments)["seconds"])
    name = f"{pair.name}, batch {batch}, {NEW} tokens after {INPUT}"
    return Row("generation", name, "tokens/s", *map(statistics.median, taken), True)


def time_to_accuracy(pair, goal, every):
    """Train until an evaluation reaches an accuracy on the validation texts.

    The time counts from the start of the process to the step, without evaluations. Both sides use
    the settings of the experiment. softprompt trains on its own batches, whose programs an earlier
    process compiled, and peft on batches sorted by length.

    Args:
      pair: the workers, which have trained one step.
      goal: the accuracy to reach.
      every: steps between evaluations.
    """
    validation = pair.work.splits["validation"]
    everything = list(range(len(validation["answers"])))
    reached = []
    sides = zip(pair.workers, ("ours", "sorted"), pair.first_step, strict=True)
    for worker, order, (seconds, _) in sides:
        step, accuracy = 1, 0.0
        while accuracy < goal and step < pair.work.steps:
            until = min(step + every - step % every, pair.work.steps)
            turn = worker("steps", order=order, numbers=list(range(step, until)))
            seconds, step = seconds + sum(turn["seconds"]), until
            worker("prepare_labels")
            turn = worker("classify", split="validation", numbers=everything, batch_size=32)
            right = [
                (odd < 0) == answer
                for odd, answer in zip(turn["odds"], validation["answers"], strict=True)
            ]
            accuracy = sum(right) / len(right)
        print(f"accuracy {accuracy:.3f} after {step} steps", file=sys.stderr)
        reached.append(seconds if accuracy >= goal else math.nan)
    first = [seconds for seconds, _ in pair.first_step]
    return [
        Row("first step after, compiled before", pair.name, "s", *first, False),
        Row(f"validation accuracy {goal} after", pair.name, "s", *reached, False),
    ]
