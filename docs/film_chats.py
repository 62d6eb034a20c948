"""Make chats, pairs and prompts about films, from 10,662 one-sentence film reviews:

    python docs/film_chats.py film cornell-movie-review-data/rotten_tomatoes

The dataset, a hub name or a folder, has rows {"text", "label"} (1: positive) and the splits train
and test. See docs/real_model.md.
"""
import json
import random
import sys
from pathlib import Path

from datasets import load_dataset

QUESTIONS = ["Write a one-sentence film review.", "What did you think of the film? One sentence.",
             "Give me one sentence about a film you saw.", "Review the movie in one sentence."]
FILMS = ["a war film", "a comedy", "a horror film", "a romance", "a western", "a documentary",
         "a science fiction film", "a musical", "a thriller", "a silent film", "a cartoon",
         "a spy film", "a heist film", "a film about sharks", "a film about chess",
         "a film about the sea"]
SIZES = {"train": (480, 600), "test": (100, 100)}  # chats and pairs of each split


def turn(role, text):
    """Return a message without the outer blanks of its text."""
    return {"role": role, "content": text.strip()}


def make_chats(rows, rng):
    """Return chats of a question and a review."""
    return [{"messages": [turn("user", rng.choice(QUESTIONS)), turn("assistant", row["text"])]}
            for row in rows]


def make_pairs(positive, negative, rng):
    """Return pairs of reviews: a positive one is chosen over a negative one."""
    pairs = []
    for chosen, rejected in zip(positive, negative, strict=False):
        question = turn("user", rng.choice(QUESTIONS))
        pairs.append({"prompt": [question], "chosen": [turn("assistant", chosen["text"])],
                      "rejected": [turn("assistant", rejected["text"])]})
    return pairs


def make_prompts(rng):
    """Return questions about films, without answers."""
    verbs = ("Describe", "Review", "Tell me about", "What do you think of")
    texts = [f"{verb} {film} in one sentence." for film in FILMS for verb in verbs]
    rng.shuffle(texts)
    return [{"messages": [turn("user", text)]} for text in texts]


def write(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder, name):
    """Write chats, pairs and prompts into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, (n_chats, n_pairs) in SIZES.items():
        rng = random.Random(0)
        rows = list(load_dataset(str(name), split=split))
        rng.shuffle(rows)
        positive = [row for row in rows if row["label"] == 1]
        negative = [row for row in rows if row["label"] == 0]
        write(folder / f"chats_{split}.jsonl", make_chats(rows[:n_chats], rng))
        pairs = make_pairs(positive[-n_pairs:], negative[-n_pairs:], rng)
        write(folder / f"pairs_{split}.jsonl", pairs)
    write(folder / "prompts.jsonl", make_prompts(random.Random(0)))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/film_chats.py FOLDER DATASET")
    main(*sys.argv[1:])
