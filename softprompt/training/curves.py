"""`curves.png`: the learning curves of a run."""

from collections.abc import Iterable
from pathlib import Path

from softprompt.storage.run_folder import read_metrics

_CHARACTERS = 40  # that fit side by side under a panel of learning curves


def draw_curves(folder: Path, metric: str) -> None:
    """Draw loss, accuracy and the deciding metric against the steps into `curves.png`."""
    from matplotlib.figure import Figure  # takes half a second, which a start should not

    records = read_metrics(folder)
    candidates = dict.fromkeys(["loss", "accuracy", metric])
    keys = [key for key in candidates if any(key in r for r in records)]
    if not keys:
        return
    evaluated = [r["step"] for r in records if r["split"] == "validation"]
    ticks = step_ticks(evaluated or [r["step"] for r in records])
    figure = Figure(figsize=(5 * len(keys), 3.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for split in ("train", "validation"):
            points = [(r["step"], r[key]) for r in records if r["split"] == split and key in r]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=split, marker="." if split != "train" else ""
                )
        axes.set(xlabel="step", ylabel=key)
        axes.set_xticks(ticks)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)


def step_ticks(steps: Iterable[int]) -> list[int]:
    """Return the steps to label on the axis of learning curves: all, or a regular part of them.

    Args:
      steps: the steps with a measurement, in any order.

    Returns:
      As many of the steps as there is room for, in ascending order.
    """
    found = sorted(set(steps))
    if not found:
        return []
    most = max(2, _CHARACTERS // (len(str(found[-1])) + 2))
    stride = next(
        nice * 10**power
        for power in range(len(str(len(found))) + 1)
        for nice in (1, 2, 5)
        if nice * 10**power * most >= len(found)
    )
    apart = (found[-1] - found[0]) / (most + 1)
    chosen: list[int] = []
    for step in found[stride - 1 :: stride]:
        if not chosen or step - chosen[-1] >= apart:
            chosen.append(step)
    return chosen
