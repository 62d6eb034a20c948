"""Measure models that were trained from toy/model, on 2,000 samples each:

    python docs/reviews.py toy/model runs/dpo

The fraction of grammatical reviews, the true valence, the score of toy/reward (the proxy), and KL
from toy/model in nats per review: see docs/frontier.md.
"""
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent))

from frontier import evaluate  # noqa: E402

NAMES = ("grammatical", "valence", "proxy", "kl")


def main(*folders):
    disable_progress_bar()
    print("".join(f"{name:>12}" for name in NAMES), " model")
    for folder in folders:
        measures = evaluate(folder, seed=0)
        print("".join(f"{measures[name]:12.3f}" for name in NAMES), f" {folder}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python docs/reviews.py MODEL [MODEL ...]")
    main(*sys.argv[1:])
