"""What `prepare.py` wrote, as both workers and their parent read it."""

import json
import random


class Workload:
    """The data of a folder.

    Attributes:
      opening: ids of the text that every row begins with.
      rows: for each training example the ids of its input and of its target.
      optimizer, steps: the settings of the experiment.
      rates: the learning rate of each method.
      labels: the id of each label's token.
      splits: for `validation` and `test` the `texts`, their `inputs` as ids, and `answers`.
    """

    def __init__(self, folder, case):
        content = json.loads((folder / "data.json").read_text())
        self.opening, self.rows = content["opening"], content["rows"]
        self.optimizer, self.steps = content["optimizer"], content["steps"]
        self.rates = content["rates"]
        self.labels = content.get("labels")
        self.splits = {name: content.get(name) for name in ("validation", "test")}
        self._batches = content["batches"].get(str(case["batch"]))

    def batch(self, order, number):
        """Return the rows of a batch, as pairs of input and target.

        Args:
          order: `ours`, as softprompt trains; `sorted`, as a `Trainer` does with
            `group_by_length`; or `random`, as it does by default.
          number: its place in training.
        """
        return [self.rows[i] for i in self._batches[order][number]]

    def lengths(self, order, number):
        """Return for each row its tokens after the opening, and its targets."""
        return [(len(i) + len(t) - 1, len(t)) for i, t in self.batch(order, number)]

    def mean_length(self):
        """Return the mean number of tokens of a row after the opening."""
        return sum(len(i) + len(t) - 1 for i, t in self.rows) / len(self.rows)

    def typical(self, order, count):
        """Return the numbers of `count` batches that together have the size of all batches."""

        def size(number):
            lengths = [length for length, _ in self.lengths(order, number)]
            return sum(lengths) if order == "ours" else max(lengths)

        numbers = sorted(range(len(self._batches[order])), key=size)
        in_group = len(numbers) // count
        groups = [numbers[i * in_group :][:in_group] for i in range(count)]

        def typical_of(group):
            mean = sum(map(size, group)) / len(group)
            return min(group, key=lambda number: abs(size(number) - mean))

        return [typical_of(group) for group in groups]


def random_rows(count, tokens):
    """Return rows of random ids to continue."""
    generator = random.Random(count)
    return [[generator.randrange(20, 40_000) for _ in range(tokens)] for _ in range(count)]
