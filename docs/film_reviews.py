"""Fits a small GPT-2 and a classifier to labelled sentences, so that ppo.py can be tried on real text:

    python docs/film_reviews.py reviews.jsonl runs/film      rows {"text": "...", "label": 0 or 1}

writes runs/film/model (400,000 weights, with a tokenizer of its own) and runs/film/classifier (labels negative, positive).
A few minutes on two cores.
"""
import sys

from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (DataCollatorForLanguageModeling, DataCollatorWithPadding, GPT2Config,
                          GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer,
                          TrainingArguments, set_seed)


class LanguageTrainer(Trainer):
    model_accepts_loss_kwargs = False


def main(file, out):
    set_seed(0)
    rows = load_dataset("json", data_files=file, split="train").train_test_split(0.1, seed=0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(rows["train"]["text"], vocab_size=2000, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>",
                                        padding_side="right", model_max_length=96)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=96, n_layer=2, n_head=4, pad_token_id=0,
                        bos_token_id=1, eos_token_id=1, id2label={0: "negative", 1: "positive"},
                        label2id={"negative": 0, "positive": 1})

    def tokenize(row):
        return {**tokenizer(row["text"] + "<eos>", truncation=True), "labels": row["label"]}

    rows = rows.map(tokenize, remove_columns=["text", "label"])
    for name, model, epochs, collator in (
            ("model", GPT2LMHeadModel(config), 3, DataCollatorForLanguageModeling(tokenizer, mlm=False)),
            ("classifier", GPT2ForSequenceClassification(config), 2, DataCollatorWithPadding(tokenizer))):
        data = rows.remove_columns("labels") if name == "model" else rows
        arguments = TrainingArguments(f"{out}/{name}", num_train_epochs=epochs, per_device_train_batch_size=64,
                                      learning_rate=2e-3 if name == "model" else 1e-3, lr_scheduler_type="cosine",
                                      warmup_steps=50, save_strategy="no", logging_steps=100, report_to="none", disable_tqdm=True,
                                      dataloader_pin_memory=False)
        right = lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}
        trainer = (LanguageTrainer if name == "model" else Trainer)(
            model, arguments, data_collator=collator, train_dataset=data["train"], eval_dataset=data["test"],
            compute_metrics=None if name == "model" else right)
        trainer.train()
        print(name, trainer.evaluate())
        model.save_pretrained(f"{out}/{name}")
        tokenizer.save_pretrained(f"{out}/{name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
