"""Draw the curves of a run:

    python docs/plot.py runs/ppo docs/ppo_toy.png objective/scores objective/kl

Each key is one of the run's metrics.jsonl. Where KEY_std is logged as well, a band of one standard
deviation is drawn around the curve.
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # write files, open no window
from matplotlib import pyplot as plt  # noqa: E402


def draw(panel, rows, key, color):
    """Draw one key's curve; a single point is a dot."""
    points = [row for row in rows if key in row]
    x = [row["update"] for row in points]
    y = [row[key] for row in points]
    std = [row.get(f"{key}_std", 0.0) for row in points]
    low = [mean - s for mean, s in zip(y, std, strict=True)]
    high = [mean + s for mean, s in zip(y, std, strict=True)]
    panel.fill_between(x, low, high, alpha=0.2, color=color)
    panel.plot(x, y, color=color, marker="o" if len(points) == 1 else "")
    panel.set(xlabel="update", ylabel=key)


def main(run, image, *keys):
    file = Path(run, "metrics.jsonl")
    if not file.is_file():
        sys.exit(f"{file} does not exist: give the output folder of a run")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    known = sorted({key for row in rows for key in row} - {"update"})
    missing = [key for key in keys if key not in known]
    if missing or not keys:
        sys.exit(f"{file} has no key {', '.join(missing) or '(give at least one)'}; it has: "
                 f"{', '.join(known)}")
    size = (1 + 4 * len(keys), 3)
    figure, panels = plt.subplots(1, len(keys), figsize=size, layout="constrained", squeeze=False)
    for number, (panel, key) in enumerate(zip(panels[0], keys, strict=True)):
        draw(panel, rows, key, f"C{number}")
    figure.savefig(image, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python docs/plot.py RUN IMAGE KEY [KEY ...]")
    main(*sys.argv[1:])
