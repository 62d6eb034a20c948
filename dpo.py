"""Direct preference optimisation of a language model: from pairs of answers, with no reward model and no sampling.

Papers: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290); Mitchell 2023, "A note on DPO with noisy
preferences" (cDPO, label_smoothing); Zhao et al. 2023, "SLiC-HF" (arXiv:2305.10425, hinge); Azar et al. 2023, "A General
Theoretical Paradigm to Understand Learning from Human Preferences" (arXiv:2310.12036, ipo); Ethayarajh et al. 2023,
"Human-Aware Loss Functions" (kto, from pairs).

Each row is a prompt x, an answer y_w that people chose and an answer y_l that they rejected. With a frozen reference pi_ref

    L = -log sigmoid(beta * h),   h = log pi(y_w|x)/pi(y_l|x) - log pi_ref(y_w|x)/pi_ref(y_l|x)                    (equation 7)

beta log pi(y|x)/pi_ref(y|x) is the reward that the policy gives the answer y: what is logged as rewards/*.

Departures from TRL 0.7.10, whose names, arguments and numbers these are:
  1. ipo takes the mean log-probability of an answer's tokens, not the sum, as its authors do.
  2. Log-probabilities are float32 whatever the model's type, and the reference never has dropout.
  3. An adapter that was trained before is compared with itself as it was handed over, not with the bare base model.
  4. max_prompt_length always holds; an answer that is cut keeps its EOS; BOS and EOS are added only where absent. Rows that
     teach nothing (an empty answer, chosen equal to rejected) are dropped and counted.
  5. precompute_ref_log_probs is done before the first step for every evaluation set too, and never by a trained policy.
  6. Metrics are means over all pairs and ranks; logits/* over answer tokens alone. An optimizer step weighs every pair alike,
     however pairs fall into micro-batches and ranks.
  7. Logits are computed for answer tokens only, and the prompt of a pair runs once where that is exact and cheaper.

    torchrun dpo.py                                         one process
    torchrun --nproc_per_node 8 dpo.py --model-name my/model --dataset pairs.jsonl --learning-rate 5e-7

With nothing but the first command a toy model learns to go on kindly with a film review: see docs/dpo.md.
"""
import copy
import json
import math
import os
import random
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ProgressCallback, Trainer, TrainingArguments

import common
from common import (TOY, InputError, Journal, base_of, check_finite, create_reference_model, explain, last_evaluation,
                    load_language_model, load_pretrained, load_rows, label_logprobs, lora_config, only_logits_of,
                    prepare_process, run, set_seed, trainer_checkpoint, with_adapter, writable_folder, write_model_card)

LOSSES = ("sigmoid", "hinge", "ipo", "kto", "kto_pair")
REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")  # columns, where the reference was run beforehand


# ------------------------------------------------------------------------------------------------ configuration
@dataclass
class DPOConfig(TrainingArguments):
    """The script's flags: every field of transformers.TrainingArguments (its documentation holds; the defaults that differ
    stand first), and the script's own."""

    output_dir: str = "runs/dpo"
    """Where the run's files go."""
    per_device_train_batch_size: int = 32
    """Pairs of one forward and backward pass, per process."""
    per_device_eval_batch_size: int = 64
    """Pairs of one evaluation batch, per process."""
    lr_scheduler_type: str = "cosine"
    """How the learning rate falls."""
    learning_rate: Optional[float] = None
    """AdamW's learning rate. None: 5e-4 x sqrt(1e5 / number of weights), which is 5e-4 for the toy model and 2e-6 for one of
    7 billion."""
    num_train_epochs: float = 8
    """Passes over the pairs."""
    logging_steps: float = 1
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When the held-out pairs are judged."""
    save_strategy: str = "epoch"
    """When a checkpoint is written."""
    save_total_limit: Optional[int] = 1
    """Checkpoints that are kept."""
    report_to: Optional[str] = "none"
    """Trackers beside metrics.jsonl: wandb, tensorboard, ..."""

    # the script's own
    model_name: Optional[str] = None
    """Policy: a hub name or a folder (a model, or a LoRA adapter). None: the toy model."""
    ref_model_name: Optional[str] = None
    """Reference: a hub name or a folder. None: the policy as it was before the first step."""
    dataset: Optional[str] = None
    """Pairs: a .jsonl/.json/.csv/.parquet file, a folder or a hub name, with columns prompt, chosen and rejected (text, or
    chat messages). None: the toy pairs."""
    eval_dataset: Optional[str] = None
    """Pairs held out. None: with the toy pairs their test rows, else none."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Weights that are trained want float32; LoRA's base model may be bfloat16."""
    lora_r: int = 0
    """Rank of a fresh LoRA adapter on all linear layers. 0: train all weights."""
    lora_alpha: int = 16
    """LoRA's scale is lora_alpha / lora_r."""
    beta: Optional[float] = None
    """How dear it is to leave the reference: larger stays closer. For ipo it is the paper's tau. None: 0.1; for the toy model 3,
    since so small a model, moved further, forgets its grammar."""
    label_smoothing: float = 0.0
    """cDPO: the share of pairs whose labels are taken to be the wrong way round, 0 to 0.5 (sigmoid only)."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "kto", "kto_pair"] = "sigmoid"
    """The loss; kto and kto_pair are the same."""
    reference_free: bool = False
    """Compare with a reference that gives all answers the same probability: none is run."""
    max_length: Optional[int] = None
    """Tokens of prompt and answer together. None: 512, or what the model takes."""
    max_prompt_length: Optional[int] = None
    """Tokens of the prompt. None: what the answers leave of max_length, at least half of it."""
    max_target_length: Optional[int] = None
    """Tokens of an encoder-decoder's answer. None: 128."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of a prompt that is too long is kept."""
    precompute_ref_log_probs: bool = False
    """Run the reference over all pairs before the first step and let it go: less memory, and less time from the second
    epoch on."""
    generate_during_eval: bool = False
    """Write answers of policy and reference to samples.jsonl, and to the trackers of report_to, at every evaluation."""
    share_prompts: Optional[bool] = None
    """Run the prompt of a pair once for both answers. None: where that is less work; False: never; True: wherever it is exact."""
    dataset_num_proc: Optional[int] = None
    """Processes that tokenise. None: this one."""

    def __post_init__(self):
        if self.learning_rate is not None:
            self.learning_rate = float(self.learning_rate)
        super().__post_init__()


# ------------------------------------------------------------------------------------------------ data
def texts_of(row, tokenizer):
    """A row's prompt, chosen and rejected as texts. Chat messages go through the tokenizer's template, a prompt that is a text as
    the user's; where the answers are whole conversations, the prompt is the messages that they begin with alike."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return prompt, chosen, rejected
    if isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or chosen[:len(prompt)] == rejected[:len(prompt)] == prompt:
        most = min(len(chosen), len(rejected)) - 1
        same = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    start = render(prompt, add_generation_prompt=True)
    whole = [render(prompt + answer) for answer in (chosen, rejected)]
    start = os.path.commonprefix([start, *whole])
    eos = tokenizer.eos_token or "\n"
    ends = [text.rstrip() if text.rstrip().endswith(eos) else text for text in whole]  # templates add a newline after EOS
    return start, *(text[len(start):] for text in ends)


def split_tokens(prompt, answers, tokenizer):
    """-> token ids of the prompt, [token ids of each answer], such that prompt + answer is how the tokenizer reads the two texts
    in one. Where a token spans the boundary it counts to the answers (of all of them, for they share the prompt)."""
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    alone, whole = encode(prompt), [encode(prompt + answer) for answer in answers]
    cut = min(next((i for i, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids))) for ids in whole)
    return alone[:cut], [ids[cut:] for ids in whole]


def cut_prompt(ids, length, mode, bos):
    """The prompt's last (keep_end) or first (keep_start) tokens, so many; a BOS at its beginning stays."""
    if len(ids) <= length or mode == "keep_start":
        return ids[:length]
    first = int(ids[0] == bos)
    return ids[:first] + ids[len(ids) - length + first:]


def cut_answer(ids, length, eos):
    """The answer's first tokens, so many, the last of them EOS where the whole answer ends in EOS."""
    return ids if len(ids) <= length else ids[:length - 1] + [eos] if ids[-1] == eos else ids[:length]


def tokenize_pair(row, tokenizer, is_encoder_decoder=False, max_length=512, max_prompt_length=None, max_target_length=128,
                  truncation_mode="keep_end", label_pad_token_id=-100):
    """{"prompt", "chosen", "rejected"} -> {"{chosen,rejected}_{input_ids,attention_mask,labels}", "prompt_{input_ids,
    attention_mask}"}, lists of ints; labels are label_pad_token_id over the prompt. Encoder-decoder: answers are labels alone.

    Too long: the prompt is cut to max_prompt_length (None: to what the longer answer leaves, at least half of max_length), then
    the answers to the rest. BOS opens the prompt and EOS closes each answer, cut or not, if the tokenizer has them."""
    prompt, *answers = texts_of(row, tokenizer)
    for name, text in zip(("prompt", "chosen", "rejected"), (prompt, *answers)):
        if not isinstance(text, str):
            raise InputError(f"{name} must be a text, or all three lists of chat messages; it is {text!r}")
    if is_encoder_decoder:
        # the tokenizer's own special tokens, as the encoder was trained; it also cuts before EOS
        encode = lambda text, length: tokenizer(text, truncation=True, max_length=length, verbose=False).input_ids
        ids = encode(prompt, max_prompt_length or max_length)
        return {"chosen_labels": encode(answers[0], max_target_length), "rejected_labels": encode(answers[1], max_target_length),
                "prompt_input_ids": ids, "prompt_attention_mask": [1] * len(ids)}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt, answers = split_tokens(prompt, answers, tokenizer)
    prompt = prompt if bos is None or prompt[:1] == [bos] else [bos] + prompt
    answers = [ids if eos is None or ids[-1:] == [eos] else ids + [eos] for ids in answers]
    room = max(max_length - max(map(len, answers)), max_length // 2) if max_prompt_length is None else max_prompt_length
    prompt = cut_prompt(prompt, room, truncation_mode, bos)
    tokens = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name, ids in zip(("chosen", "rejected"), answers):
        ids = cut_answer(ids, max_length - len(prompt), eos)
        tokens.update({f"{name}_input_ids": prompt + ids, f"{name}_attention_mask": [1] * (len(prompt) + len(ids)),
                       f"{name}_labels": [label_pad_token_id] * len(prompt) + ids})
    return tokens


def prepare_row(row, number, tokenizer, **settings):
    """tokenize_pair, and `fault`: 1 for an empty answer, 2 for a chosen answer that is the rejected one, else 0."""
    with explain(f"row {number} can't be tokenised"):
        tokens = tokenize_pair(row, tokenizer, **settings)
    skip = {settings["label_pad_token_id"], tokenizer.eos_token_id, tokenizer.bos_token_id}
    empty = any(set(tokens[f"{name}_labels"]) <= skip for name in ("chosen", "rejected"))
    return {**tokens, "fault": 1 if empty else 2 * int(tokens["chosen_labels"] == tokens["rejected_labels"])}


@dataclass
class DPODataCollatorWithPadding:
    """Rows of tokenize_pair -> tensors, padded on the right (a causal model's prompts, from which it answers, on the left).

    pad_token_id fills ids, 0 masks, label_pad_token_id labels; *_logps become float tensors [B], other columns lists."""

    pad_token_id: int = 0
    label_pad_token_id: int = -100
    is_encoder_decoder: Optional[bool] = False

    def __call__(self, features):
        batch = {}
        for key in features[0]:
            column = [row[key] for row in features]
            if key.endswith(("_input_ids", "_attention_mask", "_labels")):
                fill = {"ids": self.pad_token_id, "mask": 0, "labels": self.label_pad_token_id}[key.split("_")[-1]]
                side = "left" if key.startswith("prompt") and not self.is_encoder_decoder else "right"
                batch[key] = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in column], True, fill, padding_side=side)
            else:
                batch[key] = torch.tensor(column) if key.endswith("_logps") else column
        return batch


# ------------------------------------------------------------------------------------------------ the mathematics
def preference_losses(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1, label_smoothing=0.0,
                      loss_type="sigmoid"):
    """log pi(y_w|x), log pi(y_l|x), log pi_ref(y_w|x), log pi_ref(y_l|x), each [B] (means over tokens for ipo)
    -> losses [B]; for kto [2B], of the chosen answers and then of the rejected."""
    chosen_logratios, rejected_logratios = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    h = chosen_logratios - rejected_logratios
    if loss_type == "sigmoid":  # DPO, equation 7; with eps > 0 cDPO, equation 3
        return -F.logsigmoid(beta * h) * (1 - label_smoothing) - F.logsigmoid(-beta * h) * label_smoothing
    if loss_type == "hinge":    # SLiC: max(0, 1 - beta h)
        return torch.relu(1 - beta * h)
    if loss_type == "ipo":      # IPO, equation 17: (h - 1 / (2 tau))^2
        return (h - 1 / (2 * beta)) ** 2
    chosen_KL, rejected_KL = (r.mean().clamp(min=0) for r in (chosen_logratios, rejected_logratios))  # HALOs: z_0, of the batch
    return torch.cat([1 - torch.sigmoid(beta * (chosen_logratios - rejected_KL)),
                      1 - torch.sigmoid(beta * (chosen_KL - rejected_logratios))])


def pack(lengths):
    """Sequences into rows as wide as the longest, first fit, longest first -> width, [(row, column where it starts)]."""
    width, used, places = max(lengths), [], [None] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, taken in enumerate(used) if taken + lengths[i] <= width), len(used))
        used += [0] * (row == len(used))
        places[i] = row, used[row]
        used[row] += lengths[i]
    return width, places


def pair_lengths(batch, label_pad_token_id):
    """-> tokens of each pair's prompt, chosen and rejected answer [(p, c, r)], or None unless each pair's two sequences are one
    prompt, of a token or more, and an answer without gaps, padded on the right."""
    chosen, rejected = batch["chosen_labels"] != label_pad_token_id, batch["rejected_labels"] != label_pad_token_id
    prompt, width = chosen.int().argmax(1), min(chosen.shape[1], rejected.shape[1])
    differ = batch["chosen_input_ids"][:, :width] != batch["rejected_input_ids"][:, :width]
    differ = (differ & (torch.arange(width, device=prompt.device) < prompt[:, None])).any(1)
    fits = ~differ & (rejected.int().argmax(1) == prompt) & (prompt > 0) & (batch["chosen_attention_mask"][:, 0] > 0)
    for answer in (chosen, rejected):
        fits = fits & ((answer[:, 1:] & ~answer[:, :-1]).sum(1) == 1)
    *lengths, fits = torch.stack([prompt, chosen.sum(1), rejected.sum(1), fits]).tolist()
    return list(zip(*lengths)) if all(fits) else None


def shared_layout(batch, lengths):
    """Pairs in rows of [prompt, chosen, rejected], several pairs to a row where they fit.

    The rejected answer goes on from the prompt as though the chosen one were not there: the mask hides it, and the positions
    count from the prompt's end. -> {"input_ids", "position_ids" [R, W], "attention_mask" [R, 1, W, W] (True: sees)},
    and for the N answer tokens: where each is predicted (row, column), its id, and (answer, place in it) with the chosen
    answers 0 .. B - 1 and the rejected B .. 2B - 1."""
    width, places = pack([sum(three) for three in lengths])
    size, device = 1 + max(row for row, _ in places), batch["chosen_input_ids"].device
    T, B = max(batch[f"{name}_input_ids"].shape[1] for name in ("chosen", "rejected")), len(lengths)
    where, source, pair, part, predicts, answer, place = ([] for _ in range(7))
    for i, ((p, c, r), (row, column)) in enumerate(zip(lengths, places)):
        start, ar = row * width + column, torch.arange
        where.append(start + ar(p + c + r))
        source += [i * T + ar(p + c), (B + i) * T + p + ar(r)]
        pair.append(torch.full((p + c + r,), i))
        part += [torch.zeros(p, dtype=torch.long), torch.ones(c, dtype=torch.long), torch.full((r,), 2)]
        last = torch.tensor([start + p - 1])  # the prompt's last token predicts the first of both answers
        predicts += [last, start + p + ar(c - 1), last, start + p + c + ar(r - 1)]
        answer += [torch.full((c,), i), torch.full((r,), B + i)]
        place += [ar(c), ar(r)]
    where, source, pair, part, predicts, answer, place = (
        torch.cat(x).to(device) for x in (where, source, pair, part, predicts, answer, place))
    both = torch.cat([F.pad(batch[f"{name}_input_ids"], (0, T - batch[f"{name}_input_ids"].shape[1]))
                      for name in ("chosen", "rejected")]).flatten()
    spread = lambda values, fill: torch.full((size * width,), fill, device=device).scatter_(0, where, values).view(size, width)
    pairs, parts = spread(pair, -1), spread(part, 0)
    sees = (pairs[:, :, None] == pairs[:, None]) & ((parts[:, None] == 0) | (parts[:, :, None] == parts[:, None]))
    return {"input_ids": spread(both[source], 0), "position_ids": spread(source % T, 0), "attention_mask": sees.tril()[:, None],
            "predicts": (predicts // width, predicts % width), "targets": both[source[part > 0]], "answers": (answer, place)}


def work(rows, width, hidden_size, masked):
    """Multiplications of a forward pass, up to a factor: the matrices, and attention, of which a plain causal kernel skips half;
    one that reads a mask does not, and is taken to be half as fast."""
    return rows * width * (6 * hidden_size + (2 * width if masked else width / 2))


# ------------------------------------------------------------------------------------------------ the trainer
class DPOTrainer(Trainer):
    """DPO over transformers.Trainer, whose loop, checkpoints, distribution and trackers it has.

    Symbols in shapes: B pairs, T tokens, V the vocabulary, N answer tokens of a batch. Every method is called on every rank."""

    def __init__(self, model=None, ref_model=None, beta: float = 0.1, label_smoothing: float = 0, loss_type="sigmoid",
                 args=None, data_collator=None, label_pad_token_id: int = -100, padding_value: int = 0,
                 truncation_mode: str = "keep_end", train_dataset=None, eval_dataset=None, tokenizer=None, model_init=None,
                 callbacks=None, optimizers=(None, None), preprocess_logits_for_metrics=None, max_length=None,
                 max_prompt_length=None, max_target_length=None, peft_config=None, is_encoder_decoder=None,
                 disable_dropout: bool = True, generate_during_eval: bool = False, compute_metrics=None,
                 precompute_ref_log_probs: bool = False, model_init_kwargs=None, ref_model_init_kwargs=None,
                 model_adapter_name=None, ref_adapter_name=None, processing_class=None, reference_free: bool = False,
                 share_prompts: Optional[bool] = None, dataset_num_proc: Optional[int] = None):
        """
        model: the policy, a language model (or PeftModel) or a name, loaded with model_init_kwargs. model_init: a function that
            makes it. peft_config: puts a fresh adapter on it, whose weights alone are trained.
        ref_model: pi_ref, a model or a name, loaded with ref_model_init_kwargs. None: the policy as it is now: with PEFT
            its base model (a fresh adapter) or the adapter's weights as handed over, else a frozen copy.
        model_adapter_name, ref_adapter_name: adapters of one PeftModel that are policy and reference.
        beta, label_smoothing, loss_type, reference_free: see preference_losses and DPOConfig.
        args: TrainingArguments (None: theirs by default). tokenizer (or processing_class): the model's.
        train_dataset, eval_dataset: datasets.Dataset of rows {"prompt", "chosen", "rejected"} (text or chat), or tokenised
            already; eval_dataset may be a dict of them. Rows that hold reference_chosen_logps and reference_rejected_logps keep
            them, so a data set that was precomputed once can be saved and used again.
        max_length, max_prompt_length, max_target_length, truncation_mode: see tokenize_pair and DPOConfig.
        data_collator: None: DPODataCollatorWithPadding. label_pad_token_id: labels of what is not an answer.
        padding_value: fills input ids; 0 stands for the tokenizer's pad token.
        is_encoder_decoder: needed only where the model's config does not tell. disable_dropout: in policy and reference.
        compute_metrics: sees predictions [rows, 2], the rewards of chosen and rejected, after preprocess_logits_for_metrics;
            label_ids [rows] are 0, the place of the chosen one.
        generate_during_eval, precompute_ref_log_probs, share_prompts, dataset_num_proc: see DPOConfig.
        Raises InputError (a ValueError) for what doesn't go together, before any weight moves."""
        args = copy.copy(args) if args is not None else TrainingArguments("runs/dpo", report_to="none")
        prepare_process(args)
        tokenizer = tokenizer if tokenizer is not None else processing_class
        check_arguments(model, ref_model, beta, label_smoothing, loss_type, truncation_mode, tokenizer, model_init, peft_config,
                        model_init_kwargs, ref_model_init_kwargs, args.label_smoothing_factor)
        if data_collator is None and tokenizer.pad_token_id is None:
            raise InputError("rows are padded and the tokenizer has no padding token: set tokenizer.pad_token, for instance "
                             "tokenizer.pad_token = tokenizer.eos_token")
        self.tokenizer, self.beta, self.label_smoothing, self.loss_type = tokenizer, beta, label_smoothing, loss_type
        self.reference_free, self.disable_dropout, self.peft_config = reference_free, disable_dropout, peft_config
        self.model_adapter_name, self.ref_adapter_name = model_adapter_name, ref_adapter_name
        self.label_pad_token_id, self.truncation_mode = label_pad_token_id, truncation_mode
        self.precompute_ref_log_probs = precompute_ref_log_probs and not reference_free
        self.generate_during_eval, self.dataset_num_proc = generate_during_eval, dataset_num_proc
        self.share_prompts, self._sharing_is_exact = share_prompts, None  # None: not tried yet
        self._sums, self._eval_rows, self._start = None, [], {}
        self._keep_columns, args.remove_unused_columns = not args.remove_unused_columns, False  # Trainer would drop the tokens
        set_seed(args.seed)  # before weights are drawn that a loaded model lacks
        if model is not None:
            model = self._make_ready(load_model(model, is_encoder_decoder, model_init_kwargs), args.seed)
        super().__init__(model=model, args=args, data_collator=data_collator, processing_class=tokenizer, model_init=model_init,
                         callbacks=callbacks, compute_metrics=compute_metrics, optimizers=optimizers,
                         preprocess_logits_for_metrics=preprocess_logits_for_metrics, train_dataset=train_dataset,
                         eval_dataset=eval_dataset)
        self.loss_is_scaled_for_ga = False  # compute_loss gives a mean for Trainer to average over micro-batches and ranks
        self.is_peft_model, config = hasattr(self.model, "peft_config"), self.model.config
        self.is_encoder_decoder = bool(config.is_encoder_decoder if is_encoder_decoder is None else is_encoder_decoder)
        self.max_length, self.max_prompt_length, self.max_target_length = self._limits(
            max_length, max_prompt_length, max_target_length, getattr(config, "max_position_embeddings", None))
        self.padding_value = padding_value or tokenizer.pad_token_id or 0
        self.data_collator = data_collator or DPODataCollatorWithPadding(self.padding_value, label_pad_token_id,
                                                                         self.is_encoder_decoder)
        self._make_reference(load_model(ref_model, is_encoder_decoder, ref_model_init_kwargs))
        with args.main_process_first(desc="tokenising"):
            self.train_dataset = self._each(self._tokenized, train_dataset, "train_dataset")
            self.eval_dataset = self._each(self._tokenized, eval_dataset, "eval_dataset")
        self.train_dataset = self._each(self._with_reference, self.train_dataset)
        self.eval_dataset = self._each(self._with_reference, self.eval_dataset)

    # ------------------------------------------------------------------ 1. models and rows are made ready
    def call_model_init(self, trial=None):
        """Trainer's, which makes the model anew for each run: each is made ready alike."""
        return self._make_ready(super().call_model_init(trial), self.args.seed)

    def _make_ready(self, model, seed):
        """The adapter is put on (or chosen), dropout goes."""
        if self.peft_config is not None:
            model = with_adapter(model, copy.deepcopy(self.peft_config), seed)
        adapters = getattr(model, "peft_config", {})
        for name in {self.model_adapter_name, self.ref_adapter_name} - {None}:
            if name not in adapters:
                raise InputError(f"the model has no adapter {name!r}, but {sorted(adapters)}: load it with model.load_adapter")
        if self.model_adapter_name or self.ref_adapter_name:
            self.model_adapter_name = self.model_adapter_name or "default"
            model.set_adapter(self.model_adapter_name)
        if self.disable_dropout:
            common.disable_dropout(model)
        if hasattr(model, "peft_config"):
            model.enable_input_require_grads()  # for activation checkpointing over a frozen base
        return model

    def _make_reference(self, ref_model):
        """ref_model: the reference as a model of its own, or None where the policy stands in for it (PEFT), where its
        log-probabilities are taken before training and kept, or where there is none. _start: an adapter that was trained before,
        {name: value now}; empty for a fresh LoRA, which adds nothing yet."""
        if ref_model is None and not (self.is_peft_model or self.precompute_ref_log_probs or self.reference_free):
            ref_model = create_reference_model(self.model)
        self.ref_model = ref_model
        if ref_model is not None:
            if self.disable_dropout:
                common.disable_dropout(ref_model)
            if self.is_fsdp_enabled and self.accelerator.is_fsdp2:  # in shards as the policy is, though it has no optimizer
                from accelerate.utils.fsdp_utils import fsdp2_prepare_model
                self.ref_model = fsdp2_prepare_model(self.accelerator, ref_model).eval()
            else:
                self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=not self.is_fsdp_enabled).eval()
        elif self.is_peft_model and not self.ref_adapter_name:
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            ends = [p for name, p in trained.items() if "lora_B" in name or "lora_embedding_A" in name]
            if ends and not any(p.any() for p in ends):
                return
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise InputError("under FSDP and DeepSpeed an adapter that was trained before needs a reference of its own: load it a "
                                 "second time, model.load_adapter(folder, adapter_name='reference'), and set ref_adapter_name")
            self._start = {name: p.detach().clone() for name, p in trained.items()}

    def _limits(self, max_length, max_prompt_length, max_target_length, positions):
        """The three limits with their defaults. positions: the longest sequence that the model takes, if it has one."""
        positions = None if self.is_encoder_decoder else positions
        if positions is not None and (max_length or 0) > positions:
            warnings.warn(f"max_length={max_length}: the model takes {positions} tokens, rows are cut to that")
        limit = min(max_length or 512, positions or 10**9)
        for name, value in (("max_length", max_length), ("max_prompt_length", max_prompt_length),
                            ("max_target_length", max_target_length)):
            least = 2 if name == "max_length" else 1
            if value is not None and value < least:
                raise InputError(f"{name}={value}: give {least} or more")
        if not self.is_encoder_decoder and max_prompt_length is not None and max_prompt_length >= limit:
            raise InputError(f"max_prompt_length={max_prompt_length} leaves no token for an answer within max_length={limit}: "
                             "make it smaller")
        return limit, max_prompt_length, max_target_length or 128

    def _settings(self):
        return {name: getattr(self, name) for name in ("is_encoder_decoder", "max_length", "max_prompt_length",
                                                       "max_target_length", "truncation_mode", "label_pad_token_id")}

    @staticmethod
    def _each(function, dataset, *args):
        """function of a data set, or of each of a dict of them."""
        return {key: function(rows, *args) for key, rows in dataset.items()} if isinstance(dataset, dict) else function(dataset, *args)

    def _tokenized(self, dataset, name):
        """Rows of text or chat -> tokenised rows, without those that teach nothing. Tokenised rows stay as they are."""
        if dataset is None or "chosen_labels" in getattr(dataset, "column_names", ()):
            return dataset
        if not isinstance(dataset, Dataset):
            raise InputError(f"{name} must be a datasets.Dataset, not a {type(dataset).__name__}: use Dataset.from_list(rows)")
        chat = len(dataset) > 0 and isinstance(dataset[0].get("chosen"), list)
        missing = [c for c in ("prompt", "chosen", "rejected") if c not in dataset.column_names and not (chat and c == "prompt")]
        if missing:
            raise InputError(f"{name} has the columns {dataset.column_names} and lacks {', '.join(missing)}: rename its columns to "
                             "prompt, chosen and rejected")
        drop = [] if self._keep_columns else [c for c in dataset.column_names if c not in REFERENCE]
        tokens = dataset.map(prepare_row, with_indices=True, remove_columns=drop, num_proc=self.dataset_num_proc,
                             fn_kwargs={"tokenizer": self.tokenizer, **self._settings()})
        faults = tokens["fault"][:]
        if any(faults):
            warnings.warn(f"{name}: {sum(map(bool, faults))} of {len(faults)} rows teach nothing and are dropped: {faults.count(1)} "
                          f"with an empty answer, {faults.count(2)} whose chosen answer is the rejected one")
            tokens = tokens.select([i for i, fault in enumerate(faults) if not fault])
        if len(tokens) == 0:
            raise InputError(f"{name} has no row to learn from")
        return tokens.remove_columns("fault")

    def build_tokenized_answer(self, prompt, answer):
        """Two texts -> {"prompt_input_ids", "prompt_attention_mask", "input_ids", "attention_mask"} without BOS and EOS.

        Joined, the ids are enc(prompt + answer). That is not enc(prompt) + enc(answer) for Llama's and many other tokenizers,
        which read the answer's first word otherwise when it stands alone."""
        ids, (answer_ids,) = split_tokens(prompt, [answer], self.tokenizer)
        return {"prompt_input_ids": ids, "prompt_attention_mask": [1] * len(ids), "input_ids": answer_ids,
                "attention_mask": [1] * len(answer_ids)}

    def tokenize_row(self, feature, model=None):
        """tokenize_pair with the trainer's settings. model: an encoder-decoder, to add {chosen,rejected}_decoder_input_ids."""
        tokens = tokenize_pair(feature, self.tokenizer, **self._settings())
        for name in ("chosen", "rejected") if model is not None and self.is_encoder_decoder else ():
            labels = torch.tensor([tokens[f"{name}_labels"]])
            tokens[f"{name}_decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)[0].tolist()
        return tokens

    def get_train_dataloader(self):
        """Trainer's, over rows that hold the reference's log-probabilities where they are precomputed."""
        self.train_dataset = self._with_reference(self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        """Trainer's. eval_dataset: None, a name among several, or other rows, raw or tokenised, which are prepared here.

        Raises InputError where they need log-probabilities of a reference that is gone."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._with_reference(self._tokenized(eval_dataset, "eval_dataset"))
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As get_eval_dataloader: the rows that `predict` is to judge."""
        return super().get_test_dataloader(self._with_reference(self._tokenized(test_dataset, "test_dataset")))

    # ------------------------------------------------------------------ 2. the reference
    def _with_reference(self, dataset):
        """The rows with the columns reference_chosen_logps and reference_rejected_logps, if they are to have them."""
        if not self.precompute_ref_log_probs or dataset is None or set(REFERENCE) <= set(dataset.column_names):
            return dataset
        if self.ref_model is None and not self.is_peft_model and self.state.global_step:
            raise InputError("these rows came after training began, and the reference was let go: name them in the constructor's "
                             "eval_dataset (several in a dict), or give a ref_model")
        waiting = self.ref_model if self.ref_model is not None and not self.is_fsdp_enabled else None
        if self.ref_model is None and self.model.device.type != self.args.device.type:
            waiting = self.model  # one to be sharded, which Trainer puts on the device later
        if waiting is not None:
            waiting.to(self.args.device)
        key = "prompt_input_ids" if self.is_encoder_decoder else "chosen_input_ids"
        lengths = [len(ids) for ids in dataset[key]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)  # little padding, and the same on every rank
        size, ranks = self.args.eval_batch_size, self.accelerator.num_processes
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        batches += batches[-1:] * (-len(batches) % ranks)             # as many for each rank, which FSDP needs
        mine, logps = batches[self.accelerator.process_index::ranks], []
        loader = DataLoader(dataset, batch_sampler=mine, collate_fn=self.data_collator)
        for batch in tqdm(loader, desc="reference", disable=self.args.disable_tqdm or not self.is_world_process_zero()):
            logps.append(torch.stack(self.compute_reference_log_probs(self._prepare_inputs(batch)), dim=1).cpu())
        if waiting is not None:
            waiting.to("cpu")
        gathered = [(mine, logps)]
        if ranks > 1:
            gathered = [None] * ranks
            torch.distributed.all_gather_object(gathered, (mine, logps))
        result = torch.zeros(len(dataset), 2)
        for rows, values in gathered:
            result[torch.tensor(sum(rows, []))] = torch.cat(values)
        for i, name in enumerate(REFERENCE):
            dataset = dataset.add_column(name, result[:, i].tolist())
        return dataset

    @contextmanager
    def null_ref_context(self):
        """Inside, the policy is its own reference: the adapter ref_adapter_name instead of its own, its adapter as it was
        handed over, or none. A policy without adapter stays as it is. The policy is back afterwards, come what may."""
        model = self.accelerator.unwrap_model(self.model)
        if self.ref_adapter_name:
            model.set_adapter(self.ref_adapter_name, inference_mode=True)
        parameters = dict(model.named_parameters()) if self._start else {}

        def swap():
            for name, start in self._start.items():
                parameters[name].data, start.data = start.data, parameters[name].data

        swap()
        try:
            with model.disable_adapter() if self.is_peft_model and not (self.ref_adapter_name or self._start) else nullcontext():
                yield
        finally:
            swap()
            if self.ref_adapter_name:
                model.set_adapter(self.model_adapter_name)

    @contextmanager
    def _reference(self, model):
        """The reference, ready for a pass without gradient; model: the policy as it is called."""
        with torch.no_grad():
            if self.ref_model is not None:
                yield self.ref_model
                return
            was_training = model.training
            model.eval()  # no dropout, and nothing is recomputed
            try:
                with self.null_ref_context():
                    yield model
            finally:
                model.train(was_training)

    def compute_reference_log_probs(self, padded_batch):
        """log pi_ref of a collated batch's chosen and rejected answers, [B] each."""
        with self._reference(self.model_wrapped) as reference:
            return self._forward(reference, padded_batch, self._shared_layout(self.model_wrapped, padded_batch))[:2]

    # ------------------------------------------------------------------ 3. log-probabilities of the answers
    @staticmethod
    def concatenated_inputs(batch, is_encoder_decoder=False, label_pad_token_id=-100, padding_value=0, device=None):
        """The chosen and below them the rejected sequences of a batch, equally wide -> {"concatenated_{input_ids,
        attention_mask, labels}"} [2B, T]. Encoder-decoder: the prompts twice, and the answers as labels."""
        kinds = {"input_ids": padding_value, "attention_mask": 0, "labels": label_pad_token_id}
        result = {}
        for kind, fill in kinds.items():
            both = [f"{name}_{kind}" for name in ("chosen", "rejected")]
            if is_encoder_decoder and kind != "labels":
                both = [f"prompt_{kind}"] * 2
            width = max(batch[name].shape[1] for name in both)
            rows = torch.cat([F.pad(batch[name], (0, width - batch[name].shape[1]), value=fill) for name in both])
            result[f"concatenated_{kind}"] = rows if device is None else rows.to(device)
        return result

    @staticmethod
    def get_batch_logps(logits, labels, average_log_prob=False, label_pad_token_id=-100, is_encoder_decoder=False):
        """logits [B, T, V], labels [B, T] -> log-probabilities of each row's labels that are not label_pad_token_id [B] in
        float32: their sum, or their mean. A causal model's logits predict the label one place to the right."""
        if not is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        answers = labels != label_pad_token_id
        logps = logits.new_zeros(labels.shape, dtype=torch.float32)
        logps = logps.masked_scatter(answers, label_logprobs(logits[answers], labels[answers])).sum(1)
        return logps / answers.sum(1) if average_log_prob else logps

    def concatenated_forward(self, model, batch, answers_only=False):
        """One pass over chosen and rejected together -> their log-probabilities [B] each (sums; for ipo means), their logits
        [B, T, V] each, and a mixture of experts' balancing loss or None.

        answers_only, as training calls it: no other logits are computed; their means over each answer [B] stand in their place."""
        rows = self.concatenated_inputs(batch, self.is_encoder_decoder, self.label_pad_token_id, self.padding_value)
        ids, mask, labels = (rows[f"concatenated_{kind}"] for kind in ("input_ids", "attention_mask", "labels"))
        B, shift = len(labels) // 2, int(not self.is_encoder_decoder)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.is_encoder_decoder:
            prepare = self.accelerator.unwrap_model(model).prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = prepare(labels=labels.masked_fill(labels == self.label_pad_token_id, -100))
        if not answers_only:
            with self.accelerator.autocast():
                output = model(**inputs, use_cache=False)
            logps = self.get_batch_logps(output.logits, labels, self.loss_type == "ipo", self.label_pad_token_id,
                                         self.is_encoder_decoder)
            return *logps.split(B), *output.logits.split(B), self._balance(output)
        if shift and not self._routes(model):
            # a causal model never looks right: with all padding there nothing has to be masked, and positions count from 0
            order = mask.argsort(dim=1, descending=True, stable=True)
            labels = labels.gather(1, order)
            inputs = {"input_ids": ids.gather(1, order), "attention_mask": torch.ones_like(mask)}
        answer, place = (labels[:, shift:] != self.label_pad_token_id).nonzero(as_tuple=True)
        return self._answers(model, inputs, (answer, place), labels[answer, place + shift], (answer, place), B)

    def shared_forward(self, model, layout):
        """As concatenated_forward with answers_only, over a shared_layout: the prompt of each pair runs once."""
        mask, plain = layout["attention_mask"], self.accelerator.unwrap_model(model)
        if plain.config._attn_implementation == "eager":  # which adds the mask
            mask = torch.zeros_like(mask, dtype=plain.dtype).masked_fill_(~mask, torch.finfo(plain.dtype).min)
        inputs = {"input_ids": layout["input_ids"], "position_ids": layout["position_ids"], "attention_mask": mask}
        B = (1 + int(layout["answers"][0].max())) // 2
        return self._answers(model, inputs, layout["predicts"], layout["targets"], layout["answers"], B)

    def _answers(self, model, inputs, predicts, targets, answers, B):
        """Runs the model and gathers, for N answer tokens with ids `targets`: predicts (row, column), where the model predicts
        each; answers (answer, place in it) -> log-probabilities and mean logits, [B] of the chosen and [B] of the rejected."""
        with only_logits_of(self.accelerator.unwrap_model(model), predicts), self.accelerator.autocast():
            output = model(**inputs, use_cache=False)
        shape = (2 * B, 1 + int(answers[1].max()))
        spread = lambda values: values.new_zeros(shape).index_put(answers, values)  # sums in one order, whatever the layout
        lengths = spread(torch.ones_like(targets)).sum(1)
        with torch.no_grad():
            logits = spread(output.logits.mean(-1, dtype=torch.float32)).sum(1) / lengths
        logps = spread(label_logprobs(output.logits, targets)).sum(1)
        logps = logps / lengths if self.loss_type == "ipo" else logps
        return *logps.split(B), *logits.split(B), self._balance(output)

    def _routes(self, model):
        return getattr(self.accelerator.unwrap_model(model).config, "output_router_logits", False)

    def _balance(self, output):
        aux = getattr(output, "aux_loss", None)
        return None if aux is None else self.model.config.router_aux_loss_coef * aux

    def _forward(self, model, batch, layout):
        """The answers' log-probabilities and mean logits, with shared prompts where there is a layout for them."""
        return self.concatenated_forward(model, batch, True) if layout is None else self.shared_forward(model, layout)

    def _shared_layout(self, model, batch):
        """A shared_layout of this batch, or None where prompts aren't shared: see share_prompts in DPOConfig."""
        if self.share_prompts is False or self._sharing_is_exact is False:
            return None
        if self._sharing_is_exact is None:
            reason = self._why_not_share(model, batch)
            if reason:
                warnings.warn(f"prompts run once for each answer, not once for both: {reason}")
            self._sharing_is_exact = not reason
            return self._shared_layout(model, batch)
        lengths = pair_lengths(batch, self.label_pad_token_id)
        config = self.model.config.get_text_config()
        longest = max(p + max(c, r) for p, c, r in lengths) if lengths else 0
        windows = [getattr(config, name, None) or longest for name in ("sliding_window", "attention_chunk_size")]
        if not lengths or longest > min(windows):  # a mask would undo the window
            return None
        width, places = pack([sum(three) for three in lengths])
        shared = work(1 + max(row for row, _ in places), width, config.hidden_size, masked=True)
        apart = work(2 * len(lengths), longest, config.hidden_size, masked=False)
        return shared_layout(batch, lengths) if self.share_prompts or shared < apart else None

    def _why_not_share(self, model, batch):
        """Tries two pairs of the first batch both ways -> a reason why prompts can't be shared, or None."""
        if self.is_encoder_decoder:
            return "an encoder-decoder keeps the prompt apart from the answer anyway"
        if type(self).concatenated_forward is not DPOTrainer.concatenated_forward:
            return "concatenated_forward is not this class's own"
        models = [m for m in (model, self.ref_model) if m is not None]
        plain = [self.accelerator.unwrap_model(m) for m in models]
        kinds = {m.config._attn_implementation for m in plain} - {"sdpa", "eager"}
        if kinds or self._routes(model):
            return f"{', '.join(kinds)} attention reads no mask" if kinds else "its experts' balance is counted by the 2D mask"
        few = {k: v[:2] for k, v in batch.items()}
        lengths = pair_lengths(few, self.label_pad_token_id)
        if lengths is None:
            return "the two sequences of a pair don't begin with the same prompt"
        tokens = torch.tensor([[1 if self.loss_type == "ipo" else n for n in (c, r)] for _, c, r in lengths], device=self.args.device)
        was_training = model.training
        model.eval()
        try:
            for m in models:
                with torch.no_grad():
                    apart = self.concatenated_forward(m, few, True)
                    once = self.shared_forward(m, shared_layout(few, lengths))
                error = ((torch.stack(apart[:2]) - torch.stack(once[:2])).abs() / tokens.T).max().item()
                half = plain[0].dtype != torch.float32 or self.accelerator.mixed_precision != "no"
                if not error < (0.05 if half else 1e-4):
                    return f"with this model that would change log-probabilities by {error:.2g} a token"
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            return f"this model can't ({type(error).__name__}: {str(error).splitlines()[0]})"
        finally:
            model.train(was_training)
        return None

    # ------------------------------------------------------------------ 4. the loss
    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                 reference_free=False):
        """preference_losses with the trainer's beta, label_smoothing and loss_type, all [B] -> losses [B] (kto: [2B]), rewards of
        the chosen and of the rejected answers [B]. reference_free: the reference's log-probabilities count as 0."""
        if reference_free or self.reference_free:
            reference_chosen_logps = reference_rejected_logps = torch.zeros_like(policy_chosen_logps)
        losses = preference_losses(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                                   self.beta, self.label_smoothing, self.loss_type)
        reward = lambda policy, reference: self.beta * (policy - reference).detach()
        return (losses, reward(policy_chosen_logps, reference_chosen_logps),
                reward(policy_rejected_logps, reference_rejected_logps))

    def _pair_losses(self, model, batch):
        """-> losses [B], {metric: [B]}, one figure for each pair of this rank's batch."""
        layout = self._shared_layout(model, batch)
        if REFERENCE[0] in batch:
            reference = [batch[name] for name in REFERENCE]
        elif self.reference_free:
            reference = [None, None]
        else:
            with self._reference(model) as reference_model:
                reference = self._forward(reference_model, batch, layout)[:2]
        chosen, rejected, chosen_logits, rejected_logits, balance = self._forward(model, batch, layout)
        losses, chosen_rewards, rejected_rewards = self.dpo_loss(chosen, rejected, *reference)
        losses = losses.view(-1, len(chosen)).mean(0)  # kto has two for each pair
        losses = losses if balance is None else losses + balance
        return losses, {
            "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards, "logps/rejected": rejected.detach(),
            "logps/chosen": chosen.detach(), "logits/rejected": rejected_logits, "logits/chosen": chosen_logits}

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        """-> mean loss of a collated batch, its metrics' means {name: tensor}; for 'eval' the names begin with `eval_`."""
        losses, rows = self._pair_losses(model, batch)
        prefix = "eval_" if train_eval == "eval" else ""
        return losses.mean(), {prefix + name: values.mean() for name, values in rows.items()}

    def get_batch_samples(self, model, batch, device=None):
        """Two methods of one name. Of TRL: (model, collated batch) -> sampled texts (prompt and answer) of the policy, and of the
        reference. Of Trainer: (iterator, number of batches, device) -> the micro-batches of an optimizer step and the
        number of their pairs on all ranks."""
        if not isinstance(batch, int):
            return tuple([prompt + answer for prompt, answer in zip(*texts)] for texts in self._sample(model, batch))
        batches, _ = super().get_batch_samples(model, batch, device)
        pairs = torch.tensor(float(sum(len(b["chosen_labels"]) for b in batches)), device=device)
        return batches, self.accelerator.reduce(pairs, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss of a micro-batch, weighted such that each pair of the optimizer step counts alike: num_items_in_batch
        is how many they are, over all micro-batches and ranks."""
        losses, rows = self._pair_losses(model, inputs)
        loss = losses.mean()
        if num_items_in_batch is not None:  # Trainer divides by the micro-batches, DDP by the ranks
            parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * (len(losses) * parts / num_items_in_batch)
        check_finite(loss, self.state.global_step)
        sums = torch.stack([*(values.sum() for values in rows.values()), losses.new_tensor(len(losses)).detach()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._names = list(rows)
        return (loss, rows) if return_outputs else loss

    # ------------------------------------------------------------------ 5. what is told
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of an evaluation batch; as predictions the rewards [B, 2] of chosen and rejected, as labels 0 [B]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            losses, rows = self._pair_losses(model, inputs)
        self._names = list(rows)
        self._eval_rows.append(self.accelerator.gather_for_metrics(torch.stack([*rows.values(), losses], dim=1)))
        if prediction_loss_only:
            return losses.mean(), None, None
        rewards = torch.stack([rows["rewards/chosen"], rows["rewards/rejected"]], dim=1)
        return losses.mean(), rewards, torch.zeros(len(losses), dtype=torch.long, device=losses.device)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """Trainer's, with each metric's mean over all pairs of the set, and samples where generate_during_eval asks for them."""
        self._eval_rows = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = torch.cat(self._eval_rows).double().mean(0).tolist()
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in zip([*self._names, "loss"], means)})
        if self.generate_during_eval:
            self._tell_samples(dataloader.dataset)
        return output

    def log(self, logs, start_time=None):
        """Trainer's, with the means of the training metrics over all pairs and ranks since the last log."""
        if "loss" in logs and self._sums is not None:
            *sums, pairs = self.accelerator.reduce(self._sums, "sum").tolist()
            logs = {**logs, **{name: total / pairs for name, total in zip(self._names, sums)}}
            self._sums = None
        super().log(logs, start_time)

    @torch.no_grad()
    def _sample(self, model, batch, with_reference=True):
        """-> for the policy, and the reference if it is still there: prompts and sampled answers, lists of texts."""
        told, width = [], batch["prompt_input_ids"].shape[1]
        length = {"max_new_tokens": self.max_target_length if self.is_encoder_decoder else max(self.max_length - width, 1)}
        there = self.is_peft_model or self.ref_model is not None and not self.precompute_ref_log_probs
        for context in [nullcontext(model)] + [self._reference(model)] * (with_reference and there):
            with context as policy, self.accelerator.autocast():
                policy = self.accelerator.unwrap_model(policy)
                ids = policy.generate(input_ids=batch["prompt_input_ids"], attention_mask=batch["prompt_attention_mask"],
                                      do_sample=True, pad_token_id=self.tokenizer.pad_token_id, **length)
            answers = ids[:, 1 if self.is_encoder_decoder else width:]
            told.append([self.tokenizer.batch_decode(x, skip_special_tokens=True) for x in (batch["prompt_input_ids"], answers)])
        return told

    def _tell_samples(self, dataset):
        """Answers to a few prompts of the set, to the trackers and to samples.jsonl in output_dir."""
        rows = random.Random(self.state.global_step).sample(range(len(dataset)), min(len(dataset), self.args.eval_batch_size))
        with torch.random.fork_rng():  # what is drawn here changes nothing in training
            texts = self._sample(self.model, self._prepare_inputs(self.data_collator([dataset[i] for i in rows])))
        if not self.is_world_process_zero():
            return
        columns = ["prompt", "policy", "reference"][:1 + len(texts)]
        table = [list(row) for row in zip(texts[0][0], *(answers for _, answers in texts))]
        for callback in self.callback_handler.callbacks:
            if type(callback).__name__ == "WandbCallback":
                callback._wandb.log({"game_log": callback._wandb.Table(columns=columns, data=table)})
            if type(callback).__name__ == "TensorBoardCallback" and callback.tb_writer is not None:
                text = "\n\n".join(" | ".join(row) for row in [columns, *table])
                callback.tb_writer.add_text("game_log", text, self.state.global_step)
        with Path(self.args.output_dir, "samples.jsonl").open("a") as file:
            for row in table:
                file.write(json.dumps({"update": self.state.global_step, **dict(zip(columns, row))}) + "\n")


def check_arguments(model, ref_model, beta, label_smoothing, loss_type, truncation_mode, tokenizer, model_init, peft_config,
                    model_init_kwargs, ref_model_init_kwargs, label_smoothing_factor):
    """Raises InputError for arguments that are wrong by themselves or beside each other."""
    def refuse(condition, message):
        if condition:
            raise InputError(message)

    refuse(loss_type not in LOSSES, f"loss_type={loss_type!r}: choose one of {', '.join(LOSSES)}")
    refuse(not beta > 0, f"beta={beta}: give a number above 0; the usual one is 0.1")
    refuse(not 0 <= label_smoothing < 0.5, f"label_smoothing={label_smoothing}: give the share of wrong labels, from 0 to below 0.5")
    refuse(truncation_mode not in ("keep_end", "keep_start"), f"truncation_mode={truncation_mode!r}: choose keep_end or keep_start")
    refuse(tokenizer is None, "tokenizer is missing: give the model's tokenizer")
    refuse(model is None and model_init is None, "model is missing: give a model, its name, or model_init")
    refuse(model is not None and model_init is not None, "give either model or model_init, not both")
    refuse(ref_model is not None and ref_model is model and not isinstance(model, str),
           "ref_model is model: the reference would be trained along and the loss stay at ln 2; leave ref_model away, and the "
           "policy is copied")
    refuse(ref_model is not None and peft_config is not None,
           "ref_model and peft_config are both given: with an adapter the base model is the reference; leave ref_model away")
    refuse(model_init_kwargs is not None and not isinstance(model, str),
           "model_init_kwargs are for a model given by name; this one is made already")
    refuse(ref_model_init_kwargs is not None and not isinstance(ref_model, str),
           "ref_model_init_kwargs are for a ref_model given by name; this one is made already")
    refuse(label_smoothing_factor, "label_smoothing_factor belongs to Trainer's own loss: DPO's is label_smoothing")
    if label_smoothing and loss_type != "sigmoid":
        warnings.warn(f"label_smoothing has no part in the loss {loss_type}")


def load_model(model, is_encoder_decoder=None, kwargs=None):
    """A model object as it is; a name -> the causal or encoder-decoder language model of this name. Raises InputError."""
    if not isinstance(model, (str, Path)):
        return model
    with explain(f"model {model} can't be loaded"):
        if is_encoder_decoder is None:
            is_encoder_decoder = AutoConfig.from_pretrained(base_of(str(model))).is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        return load_pretrained(auto, str(model), True, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ the script
def main(config: DPOConfig):
    """Train a language model on pairs of answers with DPO. Returns the last evaluation's metrics (or the last step's)."""
    out = Path(config.output_dir)
    checkpoint = config.resume_from_checkpoint and trainer_checkpoint(config.resume_from_checkpoint)
    writable_folder(out, fresh=not checkpoint)
    set_seed(config.seed)
    tokenizer, model = load_language_model(config.model_name or str(TOY / "model"), config.torch_dtype)
    weights = sum(p.numel() for p in model.parameters())
    if weights < 10**6:
        torch.set_num_threads(1)  # handing out such small products to threads takes longer than they do
    held_out = config.eval_dataset or (None if config.dataset else TOY / "pairs_test.jsonl")
    pairs, test = load_rows(config.dataset or TOY / "pairs.jsonl"), held_out and load_rows(held_out)
    if test is None:
        config.eval_strategy = "no"
    if config.learning_rate is None:
        config.learning_rate = 5e-4 * math.sqrt(1e5 / weights)  # smaller models take larger steps
    if config.beta is None:
        config.beta = 0.1 if config.model_name else 3.0
    own = ("beta", "label_smoothing", "loss_type", "reference_free", "max_length", "max_prompt_length", "max_target_length",
           "truncation_mode", "precompute_ref_log_probs", "generate_during_eval", "share_prompts", "dataset_num_proc")
    seq2seq = model.config.is_encoder_decoder
    trainer = DPOTrainer(
        model, config.ref_model_name, args=config, train_dataset=pairs, eval_dataset=test, tokenizer=tokenizer,
        peft_config=lora_config(config, "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"), callbacks=[Journal(out)],
        ref_model_init_kwargs={"dtype": config.torch_dtype} if config.ref_model_name else None,
        **{field: getattr(config, field) for field in own})
    trainer.remove_callback(ProgressCallback)  # the Journal has a bar

    def show_samples(title):
        """Prints and keeps how the policy goes on from the same eight prompts."""
        rows = trainer.eval_dataset if test is not None else trainer.train_dataset
        batch = trainer.data_collator([rows[i] for i in range(min(8, len(rows)))])
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            prompts, answers = trainer._sample(trainer.model, trainer._prepare_inputs(batch), False)[0]
        if trainer.is_world_process_zero():
            tqdm.write(f"\n{title}")
            with out.joinpath("samples.jsonl").open("a") as file:
                for prompt, answer in zip(prompts, answers):
                    tqdm.write(f"  {prompt} |{answer}")
                    file.write(json.dumps({"update": trainer.state.global_step, "prompt": prompt, "policy": answer}) + "\n")

    if not checkpoint and model.device.type == config.device.type:  # a model to be sharded waits on the CPU
        show_samples("before training")
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if test is not None:
        metrics = last_evaluation(trainer)
    show_samples("after training")
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        write_model_card(out, f"A language model trained on pairs of answers with DPO (loss {config.loss_type}, beta {config.beta})",
                         config, {"pairs": config.dataset or "toy/pairs.jsonl"}, metrics)
    return metrics


if __name__ == "__main__":
    run(main, DPOConfig)
