"""The tables that are printed."""

import dataclasses

HEADER = (
    "| measure | case | unit | softprompt | peft | ratio |\n"
    "| --- | --- | --- | ---: | ---: | ---: |"
)
OPERATIONS_HEADER = (
    "| training step | required GFLOP | program | peft, sorted | peft, random "
    "| JAX GFLOP/s | PyTorch GFLOP/s | share reached | MFU |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table. `more_is_better` decides how the ratio is formed."""

    measure: str
    case: str
    unit: str
    ours: float
    theirs: float
    more_is_better: bool

    def __str__(self):
        ratio = self.ours / self.theirs if self.more_is_better else self.theirs / self.ours
        values = f"{_three_digits(self.ours)} | {_three_digits(self.theirs)} | {ratio:.2f}"
        return f"| {self.measure} | {self.case} | {self.unit} | {values} |"


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations of the measured steps, and how much of the machine's rate they reach.

    Attributes:
      case: the name of the case.
      required: operations without which no step is possible.
      program: operations of the compiled program.
      sorted, random: operations of peft on batches sorted by length and on random batches.
      seconds: what softprompt took.
      rates: operations per second of matrix products, in JAX and in PyTorch.
    """

    case: str
    required: int
    program: int
    sorted: int
    random: int
    seconds: float
    rates: tuple[float, float]

    def row(self, peak):
        """Return a row of the second table; `peak` is the published rate of the device."""
        jax, torch = (rate / 1e9 for rate in self.rates)
        reached = self.required / self.seconds
        cells = [
            self.case,
            f"{self.required / 1e9:.1f}",
            f"{self.program / self.required:.2f}",
            f"{self.sorted / self.required:.2f}",
            f"{self.random / self.required:.2f}",
            f"{jax:.0f}",
            f"{torch:.0f}",
            f"{reached / max(self.rates):.0%}",
            f"{reached / peak:.1%}" if peak else "-",
        ]
        return f"| {' | '.join(cells)} |"


def _three_digits(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
