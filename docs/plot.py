"""Draw curves of one run, or of the same run with several seeds:

    python docs/plot.py runs/ppo curves.svg objective/scores objective/kl=6
    python docs/plot.py runs/ppo-1,runs/ppo-2,runs/ppo-3 curves.svg objective/scores

Each key is one of the run's metrics.jsonl; `=6` draws a dashed line at 6, such as a target. Of one
run the band is one standard deviation, where KEY_std is logged; of several it goes from the lowest
to the highest, around the mean.
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # write files, open no window
from matplotlib import pyplot as plt  # noqa: E402


def read_metrics(run):
    """Return the lines of a run's metrics.jsonl, dicts. Exits with one sentence without any."""
    file = Path(run, "metrics.jsonl")
    if not file.is_file():
        sys.exit(f"{file} does not exist: give the output folder of a run")
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_curve(run, key):
    """Return the updates and the values of a key. Exits with the known keys if there is none."""
    rows = read_metrics(run)
    points = [(row["update"], row[key]) for row in rows if row.get(key) is not None]
    if not points:
        known = sorted({name for row in rows for name in row} - {"update"})
        sys.exit(f"{run}/metrics.jsonl has no key {key}; it has: {', '.join(known)}")
    updates, values = zip(*points, strict=True)
    return updates, values


def draw_curve(panel, runs, key, per_update=1, smooth=1, **style):
    """Draw a key's mean over runs, with a band around it.

    per_update: samples per update, for an x axis of samples. smooth: points in a moving average."""
    curves = []
    for run in runs:
        updates, values = read_curve(run, key)
        curves.append([sum(values[max(0, i - smooth + 1):i + 1]) / min(i + 1, smooth)
                       for i in range(len(values))])
    x = [update * per_update for update in updates]
    mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
    low = [min(column) for column in zip(*curves, strict=True)]
    high = [max(column) for column in zip(*curves, strict=True)]
    if len(runs) == 1:
        std = {row["update"]: row.get(f"{key}_std") or 0.0 for row in read_metrics(runs[0])}
        low = [m - std[update] for m, update in zip(mean, updates, strict=True)]
        high = [m + std[update] for m, update in zip(mean, updates, strict=True)]
    line, = panel.plot(x, mean, marker="o" if len(x) == 1 else "", **style)
    panel.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)


def draw_level(panel, value, label, below=False):
    """Draw a dashed line at a value, with its label above (or below) its right end."""
    panel.axhline(value, color="0.4", linestyle="--", linewidth=1)
    panel.annotate(label, (1, value), xycoords=("axes fraction", "data"),
                   xytext=(-4, -12 if below else 4), textcoords="offset points", ha="right",
                   color="0.3", fontsize=9)


def save(figure, image):
    """Write a figure on a white background, so that it can be read in dark mode, too."""
    matplotlib.rcParams["svg.hashsalt"] = "one figure, one file"
    metadata = {"Date": None} if str(image).endswith(".svg") else None
    figure.savefig(image, facecolor="white", dpi=130, metadata=metadata)


def main(runs, image, *keys):
    runs = runs.split(",")
    size = (1 + 4 * len(keys), 3)
    figure, panels = plt.subplots(1, len(keys), figsize=size, layout="constrained", squeeze=False)
    for number, (panel, key) in enumerate(zip(panels[0], keys, strict=True)):
        key, _, level = key.partition("=")
        draw_curve(panel, runs, key, color=f"C{number}")
        if level:
            draw_level(panel, float(level), level)
        panel.set(xlabel="update", ylabel=key)
    save(figure, image)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python docs/plot.py RUN[,RUN...] IMAGE KEY[=LEVEL] [KEY[=LEVEL] ...]")
    main(*sys.argv[1:])
