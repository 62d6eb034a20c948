"""Make a small language model with random weights, and train its tokenizer on your texts:

    python docs/film_reviews.py reviews/train.jsonl runs/film/blank

The file has rows {"text": "..."}. The model is a GPT-2 of 400,000 parameters with 2,000 tokens, for
a first try on real text: see docs/sft.md.
"""
import json
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed


def train_tokenizer(texts):
    """Train a byte-level BPE of 2,000 tokens on texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=2000, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        padding_side="right",
        model_max_length=128,
    )


def make_model(tokenizer):
    """Make a GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=96,
        n_layer=2,
        n_head=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def main(file, folder):
    """Write the tokenizer and the model into a folder."""
    set_seed(0)
    if not Path(file).is_file():
        sys.exit(f"{file} does not exist: give a file with rows {{\"text\": \"...\"}}")
    with Path(file).open() as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    make_model(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/film_reviews.py FILE FOLDER")
    main(*sys.argv[1:])
