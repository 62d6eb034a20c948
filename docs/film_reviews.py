"""Write the rows of all "Real text" pages, and a small language model for them, into a folder:

    python docs/film_reviews.py reviews cornell-movie-review-data/rotten_tomatoes

The second argument is the hub name of a dataset, or a folder that holds it, with rows {"text",
"label"} (1: positive). The rows do not depend on its order or its splits: all texts are sorted,
shuffled with one seed, and a tenth of them is held out.

    train.jsonl, test.jsonl               {"text"}
    pairs.jsonl, pairs_test.jsonl         {"prompt", "chosen", "rejected"}: positive over negative
    chats.jsonl, chats_test.jsonl         {"messages"}: a question, and a review as its answer
    chat_pairs.jsonl, chat_pairs_test.jsonl, prompts.jsonl     pairs and prompts of such chats
    blank/                                a GPT-2 of 400,000 random parameters and its tokenizer

The sentences are from film reviews on rottentomatoes.com: 5,331 positive and 5,331 negative ones
(Bo Pang and Lillian Lee 2005, "Seeing stars: Exploiting class relationships for sentiment
categorization with respect to rating scales", Proceedings of the ACL, pages 115-124). The hub gives
their licence as unknown. So this repository contains none of them, apart from a few quotations.
"""
import json
import random
import sys
from pathlib import Path

from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

QUESTIONS = ["Write a one-sentence film review.", "What did you think of the film? One sentence.",
             "Give me one sentence about a film you saw.", "Review the movie in one sentence."]
FILMS = ["a war film", "a comedy", "a horror film", "a romance", "a western", "a documentary",
         "a science fiction film", "a musical", "a thriller", "a silent film", "a cartoon",
         "a spy film", "a heist film", "a film about sharks", "a film about chess",
         "a film about the sea"]


def read_reviews(dataset):
    """Return the reviews, (text, label), for training and the held-out tenth."""
    splits = load_dataset(str(dataset)).values()
    reviews = sorted({(row["text"].strip(), row["label"]) for rows in splits for row in rows})
    random.Random(0).shuffle(reviews)
    held_out = len(reviews) // 10
    return reviews[held_out:], reviews[:held_out]


def make_pairs(reviews):
    """Return pairs (positive, negative) of texts."""
    positive = [text for text, label in reviews if label == 1]
    negative = [text for text, label in reviews if label == 0]
    return list(zip(positive, negative, strict=False))  # as many as the rarer kind has


def turn(role, text):
    """Return a message."""
    return {"role": role, "content": text}


def make_rows(reviews, rng, n_chats, n_pairs):
    """Return the rows of one split: texts, pairs, and at most so many chats and pairs of chats."""
    pairs = make_pairs(reviews)

    def question():
        return turn("user", rng.choice(QUESTIONS))

    return {
        "texts": [{"text": text} for text, _ in reviews],
        "pairs": [{"prompt": "review:", "chosen": f" {chosen}", "rejected": f" {rejected}"}
                  for chosen, rejected in pairs],
        "chats": [{"messages": [question(), turn("assistant", text)]}
                  for text, _ in reviews[:n_chats]],
        "chat_pairs": [{"prompt": [question()], "chosen": [turn("assistant", chosen)],
                        "rejected": [turn("assistant", rejected)]}
                       for chosen, rejected in pairs[-n_pairs:]],
    }


def make_prompts(rng):
    """Return questions about films, without answers."""
    verbs = ("Describe", "Review", "Tell me about", "What do you think of")
    texts = [f"{verb} {film} in one sentence." for film in FILMS for verb in verbs]
    rng.shuffle(texts)
    return [{"messages": [turn("user", text)]} for text in texts]


def train_tokenizer(texts):
    """Train a byte-level BPE of 2,000 tokens on texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=2000, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), pad_token="<pad>", eos_token="<eos>",
        bos_token="<eos>", padding_side="right", model_max_length=128)


def make_model(tokenizer):
    """Make a GPT-2 with random parameters."""
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=96, n_layer=2, n_head=4,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id))


def write(file, rows):
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder, dataset):
    """Write all rows and the model into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = read_reviews(dataset)
    rows = make_rows(train, random.Random(0), n_chats=480, n_pairs=600)
    rows_test = make_rows(test, random.Random(1), n_chats=100, n_pairs=100)
    write(folder / "train.jsonl", rows.pop("texts"))
    write(folder / "test.jsonl", rows_test.pop("texts"))
    for name in rows:
        write(folder / f"{name}.jsonl", rows[name])
        write(folder / f"{name}_test.jsonl", rows_test[name])
    write(folder / "prompts.jsonl", make_prompts(random.Random(0)))
    tokenizer = train_tokenizer(text for text, _ in train)
    tokenizer.save_pretrained(folder / "blank")
    make_model(tokenizer).save_pretrained(folder / "blank")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/film_reviews.py FOLDER DATASET")
    main(*sys.argv[1:])
