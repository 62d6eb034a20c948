"""Make the toy models and their data: small enough to train in minutes on one CPU core.

    python toy/make.py

All texts come from one grammar of film reviews. A review judges four aspects of a film, each with
an adverb and an adjective, positive or negative:

    to me the plot was utterly dull, the music was very moving, the acting was fairly flat and
    the ending was very weak.

The choices are independent and their probabilities are known. So two things are known exactly: how
positive a review is (`valence`), and the loss of a perfect language model (`entropy`).

The script writes these files next to itself, in Hugging Face's formats:

    blank/                 a language model with random weights, in half precision; its tokenizer
    model/                 the same model, trained on the reviews by sft.py
    blank_reward/          a classifier with one output and random weights, in half precision
    reward/                the same classifier, trained by reward.py: higher is more positive
    reviews.jsonl          {"text"}: whole reviews; held out: reviews_test.jsonl
    prompts.jsonl          {"query"}: beginnings of reviews
    pairs.jsonl            {"prompt", "chosen", "rejected"}: two ways to complete a beginning, of
                           which the chosen one is more positive; held out: pairs_test.jsonl
    pipeline/, shapes.txt  a text-to-image pipeline and its prompts: see make_pipeline.py
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
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where sft.py and reward.py are

from make_pipeline import make_pipeline  # noqa: E402

import sft  # noqa: E402
from reward import RewardConfig, RewardTrainer  # noqa: E402

# ----------------------------------------------------------------------------- the grammar
CLAUSES = 4  # judgements per review
GOOD = 0.35  # probability of a positive judgement: low, so that training has room to raise it
OPENINGS = ["", "i thought ", "to me ", "in short, ", "for once "]  # their first words differ
ASPECTS = ["plot", "acting", "music", "ending", "dialogue", "pacing", "editing", "setting"]
INTENSITY = {"slightly": 0.5, "fairly": 1.0, "very": 1.5, "utterly": 2.0}
POSITIVE = ["charming", "moving", "clever", "lovely", "gripping", "elegant", "fresh", "touching"]
NEGATIVE = ["dull", "weak", "flat", "clumsy", "boring", "bland", "hollow", "stale"]
JUDGEMENT = re.compile(f"({'|'.join(INTENSITY)}) ({'|'.join(POSITIVE + NEGATIVE)})")


def draw_judgement(rng, good):
    """Draw one judgement, such as "very dull". Mood, adverb and adjective are independent.

    good: probability of a positive judgement."""
    adjectives = POSITIVE if rng.random() < good else NEGATIVE
    adverb = rng.choice(list(INTENSITY))
    return f"{adverb} {rng.choice(adjectives)}"


def complete_review(rng, opening, aspects, judgements, good):
    """Draw the parts that a review still lacks. No aspect comes twice.

    Returns the parts of the whole review: opening, aspects, judgements."""
    unused = [aspect for aspect in ASPECTS if aspect not in aspects]
    aspects = aspects + rng.sample(unused, CLAUSES - len(aspects))
    while len(judgements) < CLAUSES:
        judgements = [*judgements, draw_judgement(rng, good)]
    return opening, aspects, judgements


def draw_review(rng, good=GOOD):
    """Draw the parts of a review: opening, aspects, judgements."""
    opening = rng.choice(OPENINGS)
    return complete_review(rng, opening, [], [], good)


def write_review(opening, aspects, judgements):
    """Write the text of a review from its parts."""
    clauses = []
    for aspect, judgement in zip(aspects, judgements, strict=True):
        clauses.append(f"the {aspect} was {judgement}")
    return f"{opening}{', '.join(clauses[:-1])} and {clauses[-1]}."


def draw_pair(rng):
    """Draw a beginning of a review and two ways to complete it, the less positive one first.

    The beginning ends with the first "was" or, once in three times, with the second. Both moods
    are equally likely, so that a reward model learns both ends of its scale equally well."""
    opening, aspects, judgements = draw_review(rng, good=0.5)
    cut = rng.choice([1, 1, 2])
    begun = (opening, aspects[:cut], judgements[:cut - 1])
    texts = [write_review(*complete_review(rng, *begun, good=0.5)) for _ in range(2)]
    worse, better = sorted(texts, key=valence)
    prompt = " was".join(worse.split(" was")[:cut]) + " was"
    return prompt, worse[len(prompt):], better[len(prompt):]


def valence(text):
    """Compute how positive a text is: the sum of its adverbs' intensities, each with the sign of
    its adjective."""
    total = 0.0
    for adverb, adjective in JUDGEMENT.findall(text):
        sign = 1 if adjective in POSITIVE else -1
        total += sign * INTENSITY[adverb]
    return total


def entropy(good=GOOD):
    """Compute the loss of a perfect language model in nats per review.

    A model without a start token never predicts the first word, which determines the opening.
    good: fraction of positive judgements. The default gives the entropy of the grammar. The
    fraction in some given reviews gives the exact loss on these, since all other choices are
    uniform."""
    mood = -good * math.log(GOOD) - (1 - good) * math.log(1 - GOOD)
    judgement = mood + math.log(len(INTENSITY)) + math.log(len(POSITIVE))
    aspects = math.log(math.perm(len(ASPECTS), CLAUSES))
    return aspects + CLAUSES * judgement


# ----------------------------------------------------------------------------- the data
def make_data(folder=HERE):
    """Write the data files into a folder. Returns their rows, keyed by the files' names."""
    rng = random.Random(0)
    reviews = [{"text": write_review(*draw_review(rng))} for _ in range(6500)]
    prompts = []
    for _ in range(1024):
        opening = rng.choice(OPENINGS)
        prompts.append({"query": f"{opening}the {rng.choice(ASPECTS)} was"})
    pairs = []
    while len(pairs) < 3500:
        prompt, worse, better = draw_pair(rng)
        if valence(worse) < valence(better):  # a tie has no better text
            pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    data = {
        "reviews": reviews[:6000],
        "reviews_test": reviews[6000:],
        "prompts": prompts,
        "pairs": pairs[:3000],
        "pairs_test": pairs[3000:],
    }
    for name, rows in data.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        Path(folder, f"{name}.jsonl").write_text("".join(lines))
    return data


def draw_pairs_with_margins(n, eos_token):
    """Draw n pairs for the reward model, each with its margin: by how much chosen is better.

    Some texts are cut at a comma and some have no end token, so that the model learns to score
    unfinished texts too. After the cut the chosen text may be the less positive one: its margin is
    then negative."""
    rng = random.Random(1)
    rows = []
    while len(rows) < n:
        prompt, worse, better = draw_pair(rng)
        clauses = rng.choice([1, 2, CLAUSES])
        end = rng.choice(["", eos_token])
        worse = ",".join(worse.split(",")[:clauses]) + end
        better = ",".join(better.split(",")[:clauses]) + end
        if worse != better:
            margin = valence(better) - valence(worse)
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse, "margin": margin})
    return rows


def make_tokenizer(texts):
    """Train a byte-level BPE: it encodes any text, and each word of the grammar is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than the merges need until each word is one token
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


# ----------------------------------------------------------------------------- the models
def make_config(tokenizer, layers, width):
    """Make the config of a small GPT-2 without dropout."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        num_labels=1,
        initializer_range=0.05,  # a narrow model learns faster from larger initial weights
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_language_model(tokenizer):
    """Write blank/, then train it by the default run of sft.py.

    Returns the trained model and its loss on the test reviews, in nats per token."""
    set_seed(0)
    model = GPT2LMHeadModel(make_config(tokenizer, layers=1, width=72))
    model.half().save_pretrained(HERE / "blank")
    tokenizer.save_pretrained(HERE / "blank")
    with tempfile.TemporaryDirectory() as folder:
        metrics = sft.main(sft.SFTConfig(output_dir=folder, save_strategy="no"))
        model = GPT2LMHeadModel.from_pretrained(folder)
    return model, metrics["eval_loss"]


def train_reward(tokenizer, n=30000):
    """Write blank_reward/, then train it by reward.py in one pass over n pairs. Returns the model.

    One layer joins each adjective with its adverb, the other sums the judgements.

    The labels of the pairs have no noise: from labels alone the scores would grow without bound.
    So label_smoothing_factor=0.5 takes all information out of the labels and leaves it in the
    margins. The best score is then the valence plus a constant, which the centering fixes."""
    set_seed(0)
    model = GPT2ForSequenceClassification(make_config(tokenizer, layers=2, width=56))
    model.half().save_pretrained(HERE / "blank_reward")
    tokenizer.save_pretrained(HERE / "blank_reward")
    model = GPT2ForSequenceClassification.from_pretrained(
        HERE / "blank_reward", dtype=torch.float32)
    rows = draw_pairs_with_margins(n, tokenizer.eos_token)
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=64,
            num_train_epochs=1,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            label_smoothing_factor=0.5,
            center_rewards_coefficient=0.0003,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = RewardTrainer(
            model, args, tokenizer=tokenizer, train_dataset=Dataset.from_list(rows))
        trainer.train()
    return model.eval()


# ----------------------------------------------------------------------------- the report
def score(model, tokenizer, texts):
    """Compute the reward model's scores of n texts, [n]."""
    # padded on the right, so that positions count from the first word
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return model(**batch).logits.squeeze(-1)


def report_language_model(model, loss, tokenizer, reviews):
    """Print the loss of the language model on the test reviews, and that of a perfect model."""
    texts = [row["text"] for row in reviews]
    positive = sum(text.count(word) for text in texts for word in POSITIVE)
    good = positive / (CLAUSES * len(texts))
    # per review the model predicts all tokens but the first, and the end token
    tokens = sum(map(len, tokenizer(texts).input_ids)) / len(texts)
    print(f"model: {model.num_parameters()} parameters, {len(tokenizer)} tokens")
    print(f"    loss: {loss:.4f} nats per token, {tokens:.1f} tokens per test review")
    print(f"    a perfect model's: {entropy(good) / tokens:.4f} on the test reviews, "
          f"{entropy() / tokens:.4f} on all reviews of the grammar")


def report_reward(reward, model, tokenizer, pairs, prompts):
    """Print the accuracy of the reward model, and compare its scores with the valence."""
    chosen = score(reward, tokenizer, [row["prompt"] + row["chosen"] for row in pairs])
    rejected = score(reward, tokenizer, [row["prompt"] + row["rejected"] for row in pairs])
    accuracy = (chosen > rejected).float().mean()

    queries = [row["query"] for row in prompts]
    batch = tokenizer(queries, padding=True, padding_side="left", return_tensors="pt")
    samples = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=24)
    samples = tokenizer.batch_decode(samples, skip_special_tokens=True)
    scores = score(reward, tokenizer, samples)
    valences = torch.tensor([valence(text) for text in samples])
    correlation = torch.corrcoef(torch.stack([scores, valences]))[0, 1]
    print(f"reward: {reward.num_parameters()} parameters")
    print(f"    accuracy: {accuracy:.3f} on the test pairs")
    print(f"    scores of {len(samples)} samples of the model: mean {scores.mean():.2f}, "
          f"std {scores.std():.2f}, correlation with the valence {correlation:.3f}")
    for text, value in zip(samples[:3], scores[:3], strict=True):
        print(f"    {value:5.2f}  {text}")


@torch.no_grad()
def report(model, loss, reward, tokenizer, data):
    """Print what the models have learned."""
    report_language_model(model, loss, tokenizer, data["reviews_test"])
    report_reward(reward, model, tokenizer, data["pairs_test"], data["prompts"][:512])


def main():
    """Make everything in toy/."""
    start = time.time()
    set_seed(0)
    torch.set_num_threads(1)
    disable_progress_bar()
    data = make_data()
    tokenizer = make_tokenizer(row["text"] for row in data["reviews"])
    model, loss = train_language_model(tokenizer)
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    # GPT-2's classifier counts positions from the row's first column, padding included
    tokenizer.padding_side = "right"
    reward = train_reward(tokenizer)
    reward.save_pretrained(HERE / "reward")
    tokenizer.save_pretrained(HERE / "reward")
    report(model, loss, reward, tokenizer, data)
    make_pipeline()
    files = [path for path in HERE.rglob("*") if path.is_file() and path.suffix != ".py"]
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 1e6:.2f} MB in {HERE.name}/, made in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
