"""Make the toy world: tiny models and their data, small enough to train on one core in a few minutes.

    python toy/make.py

Everything comes from one small grammar of film reviews. A review judges four aspects of a film, each with an adverb
and an adjective, kindly or unkindly:

    to me the plot was utterly dull, the music was very moving, the acting was fairly flat and the ending was very weak.

The choices are independent and their probabilities known. So we know what the world holds: how many nats a perfect
language model would lose on a review (`entropy`), and how positive a review truly is (`valence`). The files, all in
ordinary Hugging Face formats, lie beside this one:

    blank/                              a causal language model that has learnt nothing yet, in half precision, and its tokenizer
    model/                              the same, trained on the reviews by sft.py
    reward/                             a classifier with one output, trained by reward.py: higher is more positive
    blank_reward/                       the same before it has learnt anything, in half precision: where reward.py starts
    reviews.jsonl  reviews_test.jsonl   {"text"}                        whole reviews
    prompts.jsonl                       {"query"}                       beginnings of reviews
    pairs.jsonl    pairs_test.jsonl     {"prompt", "chosen", "rejected"} two ways to go on; chosen is more positive
    pipeline/      shapes.txt           what draws coloured shapes, by make_pipeline.py
"""
import json
import math
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast,
                          set_seed)
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import sft  # noqa: E402
from make_pipeline import make_pipeline  # noqa: E402
from reward import RewardConfig, RewardTrainer  # noqa: E402

# ---------------------------------------------------------------------------------------------------- the grammar

CLAUSES = 4
GOOD = 0.35                             # the chance of a good mood: critics are harsh, which leaves room to improve
OPENINGS = ["", "i thought ", "to me ", "in short, ", "for once "]     # the first word tells which
ASPECTS = ["plot", "acting", "music", "ending", "dialogue", "pacing", "editing", "setting"]
INTENSITY = {"slightly": 0.5, "fairly": 1.0, "very": 1.5, "utterly": 2.0}
POSITIVE = ["charming", "moving", "clever", "lovely", "gripping", "elegant", "fresh", "touching"]
NEGATIVE = ["dull", "weak", "flat", "clumsy", "boring", "bland", "hollow", "stale"]


def judge(rng, good):
    """One judgement, such as "very dull": mood, adverb and adjective are independent."""
    mood = POSITIVE if rng.random() < good else NEGATIVE
    return f"{rng.choice(list(INTENSITY))} {rng.choice(mood)}"


def draw(rng, opening=None, aspects=(), judgements=(), good=GOOD):
    """Draw the parts of a review, or those that are missing from one that has begun. No aspect comes twice."""
    opening = rng.choice(OPENINGS) if opening is None else opening
    unused = [aspect for aspect in ASPECTS if aspect not in aspects]
    return (opening, [*aspects, *rng.sample(unused, CLAUSES - len(aspects))],
            [*judgements, *(judge(rng, good) for _ in range(CLAUSES - len(judgements)))])


def write(opening, aspects, judgements):
    *first, last = [f"the {aspect} was {judgement}" for aspect, judgement in zip(aspects, judgements)]
    return f"{opening}{', '.join(first)} and {last}."


def pair(rng):
    """Two reviews with the same beginning, which is cut at the first "was" or, one time in three, at the second.

    Kind and unkind in equal parts, so that the reward model learns both ends of its scale equally well."""
    opening, aspects, judgements = draw(rng, good=0.5)
    cut = rng.choice([1, 1, 2])
    start = opening, aspects[:cut], judgements[:cut - 1]
    texts = sorted((write(*draw(rng, *start, good=0.5)) for _ in range(2)), key=valence)
    prompt = " was".join(texts[0].split(" was")[:cut]) + " was"
    return prompt, *texts


def valence(text):
    """How positive a text is: the sum of its judgements, each with the sign of its mood and the size of its adverb."""
    found = re.findall(rf"({'|'.join(INTENSITY)}) ({'|'.join(POSITIVE + NEGATIVE)})", text)
    return sum(INTENSITY[adverb] if adjective in POSITIVE else -INTENSITY[adverb] for adverb, adjective in found)


def entropy(good=GOOD):
    """Nats per review, given its first word (which a model without a start token is never asked to predict).

    `good` is the share of good moods. With the share found in some reviews this is their exact mean surprise, since
    every other choice is uniform; with the default it is the entropy of the grammar.
    """
    mood = -good * math.log(GOOD) - (1 - good) * math.log(1 - GOOD)
    judgement = mood + math.log(len(INTENSITY)) + math.log(len(POSITIVE))
    return math.log(math.perm(len(ASPECTS), CLAUSES)) + CLAUSES * judgement


# ------------------------------------------------------------------------------------------------------- the data

def make_data():
    rng = random.Random(0)
    reviews = [{"text": write(*draw(rng))} for _ in range(6500)]
    prompts = [{"query": f"{rng.choice(OPENINGS)}the {rng.choice(ASPECTS)} was"} for _ in range(1024)]
    pairs = []
    while len(pairs) < 3500:
        prompt, worse, better = pair(rng)
        if valence(worse) < valence(better):                                        # a tie teaches nothing
            pairs.append({"prompt": prompt, "chosen": better[len(prompt):], "rejected": worse[len(prompt):]})
    data = {"reviews": reviews[:6000], "reviews_test": reviews[6000:], "prompts": prompts,
            "pairs": pairs[:3000], "pairs_test": pairs[3000:]}
    for name, rows in data.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def make_tokenizer(texts):
    """Byte-level BPE: it can encode any text, and the merges run until each word of the grammar is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", padding_side="left",
        model_max_length=128, clean_up_tokenization_spaces=False)


# ----------------------------------------------------------------------------------------------------- the models

def config(tokenizer, layers, width):
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=width, n_layer=layers, n_head=4, num_labels=1,
                      initializer_range=0.05,                    # narrow models learn faster from a wider start
                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special)


def encode(tokenizer, texts):
    """A batch padded on the right, so that positions count from the first word."""
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")


def score(model, tokenizer, texts):
    return model(**encode(tokenizer, texts)).logits.squeeze(-1)


def score_pairs(model, tokenizer, rows):
    """The scores of the chosen texts and those of the rejected."""
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
    return score(model, tokenizer, texts).chunk(2)


def train_language_model(tokenizer):
    """The language model, by sft.py's default run -> model, its loss on the test reviews in nats per token."""
    set_seed(0)
    GPT2LMHeadModel(config(tokenizer, layers=1, width=72)).half().save_pretrained(HERE / "blank")
    tokenizer.save_pretrained(HERE / "blank")
    with tempfile.TemporaryDirectory() as folder:
        metrics = sft.main(sft.SFTConfig(folder, save_strategy="no"))
        return GPT2LMHeadModel.from_pretrained(folder), metrics["eval_loss"]


def judged_pairs(n, eos_token):
    """Fresh pairs for the reward model, and by how much the chosen text of each is better: its `margin`.

    The pairs in the files are noise-free, and from those alone the scores would grow without bound. Here we know by how
    much a text is better, and so may say that the labels tell nothing (label_smoothing_factor=0.5) and the margins all: the
    best score is then the valence itself, up to a constant, which centring draws to where scores are zero on average.

    Some texts are cut at a comma, some have the end mark: an unfinished text is scored by what it says so far."""
    rng, rows = random.Random(1), []
    while len(rows) < n:
        prompt, *texts = pair(rng)
        clauses, end = rng.choice([1, 2, CLAUSES]), rng.choice(["", eos_token])
        worse, better = (",".join(text[len(prompt):].split(",")[:clauses]) + end for text in texts)
        if worse != better:
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse, "margin": valence(better) - valence(worse)})
    return rows


def train_reward(tokenizer, n=30000):
    """The reward model, by reward.py: in one pass over n pairs. One layer joins each adjective to its adverb, a second sums up."""
    set_seed(0)
    GPT2ForSequenceClassification(config(tokenizer, layers=2, width=56)).half().save_pretrained(HERE / "blank_reward")
    tokenizer.save_pretrained(HERE / "blank_reward")
    model = GPT2ForSequenceClassification.from_pretrained(HERE / "blank_reward", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        how = RewardConfig(folder, per_device_train_batch_size=64, num_train_epochs=1, learning_rate=2e-3, weight_decay=0.01,
                           lr_scheduler_type="cosine", label_smoothing_factor=0.5, center_rewards_coefficient=0.0003,
                           gradient_checkpointing=False, remove_unused_columns=False, save_strategy="no", disable_tqdm=True)
        rows = Dataset.from_list(judged_pairs(n, tokenizer.eos_token))
        RewardTrainer(model, how, tokenizer=tokenizer, train_dataset=rows).train()
    return model.eval()


@torch.no_grad()
def report(model, loss, reward, tokenizer, data):
    texts = [row["text"] for row in data["reviews_test"]]
    good = sum(text.count(word) for text in texts for word in POSITIVE) / CLAUSES / len(texts)
    tokens = sum(map(len, tokenizer(texts).input_ids)) / len(texts)     # the first is given, but the end mark is not
    chosen, rejected = score_pairs(reward, tokenizer, data["pairs_test"])
    queries = [row["query"] for row in data["prompts"][:512]]
    batch = tokenizer(queries, return_tensors="pt", padding=True, padding_side="left")
    samples = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=24)
    samples = tokenizer.batch_decode(samples, skip_special_tokens=True)
    scores, truth = score(reward, tokenizer, samples), torch.tensor([valence(text) for text in samples])
    print(f"weights: {model.num_parameters()} in model, {reward.num_parameters()} in reward; {len(tokenizer)} tokens")
    print(f"model: {loss:.4f} nats per token in {tokens:.1f} tokens of a test review")
    print(f"    a perfect model: {entropy(good) / tokens:.4f} on these reviews, {entropy() / tokens:.4f} on all")
    print(f"reward: accuracy {(chosen > rejected).float().mean():.3f} on the test pairs; on 512 samples of the model "
          f"mean {scores.mean():.2f}, std {scores.std():.2f}, "
          f"correlation with the valence {torch.corrcoef(torch.stack([scores, truth]))[0, 1]:.3f}")
    for text, value in zip(samples[:3], scores):
        print(f"    {value:5.2f}  {text}")


def main():
    start = time.time()
    set_seed(0)
    torch.set_num_threads(1)
    disable_progress_bar()
    data = make_data()
    tokenizer = make_tokenizer(row["text"] for row in data["reviews"])
    model, loss = train_language_model(tokenizer)
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    tokenizer.padding_side = "right"            # the classifier works out no positions: they count from the row's start
    reward = train_reward(tokenizer)
    reward.save_pretrained(HERE / "reward")
    tokenizer.save_pretrained(HERE / "reward")
    report(model, loss, reward, tokenizer, data)
    make_pipeline()
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix != ".py" and path.is_file())
    print(f"{size / 1e6:.2f} MB in {HERE.name}/, made in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
