"""A small GPT-2 that has learnt nothing yet, and a tokenizer for your texts, so that real text can be tried from the start:

    python docs/film_reviews.py reviews/train.jsonl runs/film/blank        rows {"text": "..."}

400,000 weights, 2,000 tokens. docs/sft.md goes on from there.
"""
import json
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed


def main(file, folder):
    set_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((json.loads(line)["text"] for line in Path(file).open()), vocab_size=2000,
                            special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>",
                                        padding_side="right", model_max_length=128)
    tokenizer.save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=96, n_layer=2, n_head=4, pad_token_id=0,
                               bos_token_id=1, eos_token_id=1)).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
