"""Draws a run's curves: python docs/plot.py RUN PICTURE KEY [KEY ...], such as

    python docs/plot.py runs/ppo docs/ppo_toy.png objective/scores objective/kl

A key is one of metrics.jsonl. Where there is KEY_std beside it, a band of one standard deviation is drawn."""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(run, picture, *keys):
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    figure, panels = plt.subplots(1, len(keys), figsize=(1 + 4 * len(keys), 3), layout="constrained", squeeze=False)
    for number, (panel, key) in enumerate(zip(panels[0], keys)):
        x, y, std = zip(*((row["update"], row[key], row.get(f"{key}_std", 0)) for row in rows if key in row))
        panel.plot(x, y, color=f"C{number}")
        panel.fill_between(x, [m - s for m, s in zip(y, std)], [m + s for m, s in zip(y, std)], alpha=0.2, color=f"C{number}")
        if std[0]:
            panel.axhline(y[0] + 2 * std[0], color="grey", linestyle=":", linewidth=1)
            panel.text(x[-1], y[0] + 2 * std[0], "first mean + 2 std", ha="right", va="bottom", color="grey", fontsize=8)
        panel.set(xlabel="update", ylabel=key)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
