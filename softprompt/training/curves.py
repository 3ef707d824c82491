"""`curves.png`: the learning curves of a run."""

from pathlib import Path

from softprompt.storage.run_folder import read_metrics


def draw_curves(folder: Path, metric: str) -> None:
    """Draw loss, accuracy and the deciding metric against the steps into `curves.png`."""
    from matplotlib.figure import Figure  # takes half a second, which a start should not

    records = read_metrics(folder)
    candidates = dict.fromkeys(["loss", "accuracy", metric])
    keys = [key for key in candidates if any(key in r for r in records)]
    if not keys:
        return
    figure = Figure(figsize=(5 * len(keys), 3.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for split in ("train", "validation"):
            points = [(r["step"], r[key]) for r in records if r["split"] == split and key in r]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=split, marker="." if split != "train" else ""
                )
        axes.set(xlabel="step", ylabel=key)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
