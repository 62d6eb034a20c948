"""Draw a run of ddpo.py, its reward and its images before and after:

    python docs/ddpo_plot.py runs/ddpo docs/ddpo_toy.png
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # write files, open no window
from matplotlib import pyplot as plt  # noqa: E402


def find(run, name):
    """Return the path of a run's file. Exits with one sentence if it does not exist."""
    file = Path(run, name)
    if not file.is_file():
        sys.exit(f"{file} does not exist: give the output folder of a finished run of ddpo.py")
    return file


def read(run, name, *keys):
    """Read a run's file of JSON lines. Exits with one sentence if a line lacks one of the keys."""
    file = find(run, name)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if not rows:
        sys.exit(f"{file} is empty: give the output folder of a finished run of ddpo.py")
    for row in rows:
        missing = [key for key in keys if key not in row]
        if missing:
            sys.exit(f"{file} has no key {', '.join(missing)}; it has: {', '.join(sorted(row))}")
    return rows


def draw_reward(panel, rows):
    """Draw the mean reward per epoch, with a band of one standard deviation around it."""
    epochs = [row["update"] for row in rows]
    mean = [row["reward_mean"] for row in rows]
    low = [row["reward_mean"] - row["reward_std"] for row in rows]
    high = [row["reward_mean"] + row["reward_std"] for row in rows]
    panel.plot(epochs, mean, color="C0", marker="o" if len(rows) == 1 else "")
    panel.fill_between(epochs, low, high, alpha=0.2, color="C0")
    panel.set(xlabel="epoch", ylabel="reward (mean ± one std)")


def draw_images(panel, image, title, samples):
    """Draw a grid of images, with the samples' mean reward above it."""
    mean = sum(sample["reward"] for sample in samples) / len(samples)
    panel.imshow(plt.imread(image))
    panel.set_title(f"{title}: mean reward {mean:.2f}", fontsize=10)
    panel.axis("off")


def main(run, image):
    """Draw a run into an image file."""
    rows = read(run, "metrics.jsonl", "update", "reward_mean", "reward_std")
    samples = read(run, "samples.jsonl", "epoch", "reward")
    last = samples[-1]["epoch"]
    before = [sample for sample in samples if sample["epoch"] == 0]
    after = [sample for sample in samples if sample["epoch"] == last]
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    draw_reward(panels[0], rows)
    draw_images(panels[1], find(run, "before.png"), "before", before)
    draw_images(panels[2], find(run, "after.png"), "after", after)
    figure.savefig(image, dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/ddpo_plot.py RUN IMAGE")
    main(*sys.argv[1:])
