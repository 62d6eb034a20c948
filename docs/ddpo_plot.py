"""Draws a DDPO run, its curve and its pictures before and after: python docs/ddpo_plot.py runs/ddpo docs/ddpo_toy.png"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(run, picture):
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    epochs, mean, std = ([row[key] for row in rows] for key in ("update", "reward_mean", "reward_std"))
    figure, (curve, *grids) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    curve.plot(epochs, mean, color="C0")
    curve.fill_between(epochs, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], alpha=0.2, color="C0")
    curve.set(xlabel="epoch", ylabel="reward (mean ± one std)")
    samples = [json.loads(line) for line in Path(run, "samples.jsonl").read_text().splitlines()]
    for axis, title, epoch in zip(grids, ("before", "after"), (0, samples[-1]["epoch"])):
        rewards = [row["reward"] for row in samples if row["epoch"] == epoch]
        axis.imshow(plt.imread(Path(run, f"{title}.png")))
        axis.set_title(f"{title}: mean reward {sum(rewards) / len(rewards):.2f}", fontsize=10)
        axis.axis("off")
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
