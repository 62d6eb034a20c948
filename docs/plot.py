"""Draws a run's learning curve: python docs/plot.py runs/ppo docs/ppo_toy.png"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(run, picture):
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    updates = [row["update"] for row in rows]
    score, std = ([row[f"objective/scores{end}"] for row in rows] for end in ("", "_std"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(updates, score, color="C0")
    left.fill_between(updates, [m - s for m, s in zip(score, std)], [m + s for m, s in zip(score, std)], alpha=0.2, color="C0")
    left.axhline(score[0] + 2 * std[0], color="grey", linestyle=":", linewidth=1)
    left.text(updates[-1], score[0] + 2 * std[0], "first mean + 2 std", ha="right", va="bottom", color="grey",
              fontsize=8)
    left.set(xlabel="PPO update", ylabel="score (mean ± one std)")
    right.plot(updates, [row["objective/kl"] for row in rows], color="C1")
    right.set(xlabel="PPO update", ylabel="KL (nats a response)", ylim=(0, None))
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
