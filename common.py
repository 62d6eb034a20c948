"""What the six trainers share, in two parts.

Part 1, what an algorithm needs:
    set_seed, setup_ranks                    one seed everywhere; torchrun's processes form a group
    logprobs_from_logits, masked_mean, ...   log-probabilities, statistics over unmasked tokens
    only_logits_of, disable_dropout, ...     forward passes without waste and without noise
    AutoModelForCausalLMWithValueHead        a language model with a value head (also: Seq2Seq)
    create_reference_model, copy_adapter     the policy that training starts from, frozen
    generate                                 one sampled response per prompt

Part 2, the machinery:
    run, explain, check_ranges, ...          the command line: flags in, one clear sentence out
    load_rows, load_prompts                  data: a file, a folder or a hub name
    render_chat, tokenize_chat, join_chat    chats: the template, and what the assistant writes
    load_reward, reward_inputs               rewards: a function or a classifier, and what it reads
    load_language_model, prepare_training    models and adapters
    writable_folder, MetricsFile, ...        the output folder and its files
    start_run, TrainerFlags, Journal, ...    what the four files on Trainer share
    RetiredArguments, replace_retired        fields of transformers 4's TrainingArguments
    LoopTrainer                              accelerator, trackers, checkpoints of ppo.py, ddpo.py

Nothing happens at import: no network, no CUDA, no seed.
"""
import argparse
import copy
import ctypes
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Optional, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    TrainerCallback,
)
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

TOY = Path(__file__).resolve().parent / "toy"
VALUE_HEAD_FILE = "value_head.safetensors"


class InputError(ValueError):
    """A wrong input of the user, in one sentence. `run` prints it without a traceback."""


# ----------------------------------------------------------------------------- seeds and ranks
def set_seed(seed: int):
    """Seed `random`, `numpy.random` and `torch` on the calling rank, all with the same number."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def setup_ranks():
    """Prepare torchrun's processes; call it before anything of accelerate or Trainer.

    With GPUs each process takes its own. Without one, accelerate would start WORLD_SIZE independent
    copies of the job; with ACCELERATE_USE_CPU it forms a gloo group."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.set_float32_matmul_precision("high")  # float32 products may use TF32
        return
    keep_freed_memory()
    if os.environ.get("WORLD_SIZE") == "1":  # one process needs no group, and Trainer warns of one
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
    elif "WORLD_SIZE" in os.environ:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def prepare_process(args):
    """Check the devices of a Trainer's process. Raises InputError for several GPUs in one process.

    Trainer would split each batch among threads, which the algorithms here do not support."""
    if args.n_gpu > 1:
        raise InputError(f"this process sees {args.n_gpu} GPUs: start one process per GPU with "
                         f"torchrun --nproc_per_node {args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0")
    if not torch.cuda.is_available():
        keep_freed_memory()


def keep_freed_memory():
    """Let malloc keep large freed blocks, on CPUs.

    By default glibc returns each block to the system, which clears it again for the next tensor:
    a fifth of the time of a PPO step."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def unsharded(model):
    """Gather the weights that FSDP 2 has sharded, once, for many forward passes.

    Call on every rank. Ranks may then call the model unequally often, as they do in sampling."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


# ----------------------------------------------------------------------------- log-probabilities
def logprobs_from_logits(logits, labels, gather=True):
    """Compute log p(label) [...] in float32 from logits [..., V] and labels [...].

    gather=False: the whole log-softmax [..., V]."""
    if not gather:
        return F.log_softmax(logits.float(), dim=-1)
    nll = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
    return -nll.view(labels.shape)


def entropy_from_logits(logits):
    """Compute the entropy [...] (nats) of the distributions with logits [..., V]."""
    # log sum exp(z) - sum p z: one temporary of the logits' size
    return logits.logsumexp(-1) - torch.linalg.vecdot(logits.softmax(-1), logits)


def masked_mean(values, mask, axis=None):
    """Average the values under the mask, over all dimensions or over one."""
    return (values * mask).sum(axis) / mask.sum(axis)


def masked_var(values, mask, unbiased=True):
    """Compute the variance of the values under the mask; unbiased if there are two or more."""
    n = mask.sum()
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * n / (n - 1) if unbiased and n > 1 else variance


def masked_whiten(values, mask, shift_mean=True, sum_over_ranks=lambda x: x):
    """Scale the values under the mask to variance 1 and mean 0. shift_mean=False: keep their mean.

    The moments are those of all ranks. Fewer than two values are returned as they are."""
    n, total = sum_over_ranks(torch.stack([mask.sum().float(), (values * mask).sum().float()]))
    if n < 2:
        return values
    mean = total / n
    var = sum_over_ranks(((values - mean) ** 2 * mask).sum()) / (n - 1)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def whiten(values, shift_mean=True):
    """Scale all values to variance 1 and mean 0. shift_mean=False: keep their mean."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


# ----------------------------------------------------------------------------- forward passes
def check_finite(loss, done, of="optimizer steps"):
    """Raise InputError before a loss that is not finite reaches a weight."""
    if not torch.isfinite(loss):
        raise InputError(f"the loss is {loss.item()} after {done} {of}: look at the data, or "
                         "resume from the last checkpoint with a lower learning rate")


def split(rows, size):
    """Split rows into consecutive parts of this size; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def batches_of_similar_length(lengths, max_tokens):
    """Group row numbers by length into lists of at most max_tokens tokens, padding included."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


@contextmanager
def only_logits_of(model, select):
    """Let the model return the logits of the N tokens under select [B, T] (bool) only: [N, V].

    With a vocabulary of 100,000, the logits of prompts and padding are most of a batch's memory,
    and a third of the time of a PPO step. The hidden states are selected just before the output
    layer, so whatever the model does to its logits (scaling, soft-capping) it does to these.
    model: plain, wrapped by accelerate, or with a value head."""
    model = getattr(model, "module", model)
    head = getattr(model, "pretrained_model", model).get_output_embeddings()
    # prompt tuning puts virtual tokens before the T of the text
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, -select.shape[1]:][select],))
    try:
        yield
    finally:
        hook.remove()


JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def disable_dropout(model):
    """Turn dropout off for good, in train mode too: two policies are compared token by token.

    Train mode stays, since gradient checkpointing needs it. Some models keep the probability as a
    number of their own (dropout, layerdrop, drop_prob), or read it from their config (Falcon).
    Routers of experts multiply their inputs by random numbers: that goes, too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        configs = [x for x in vars(module).values() if isinstance(x, PreTrainedConfig)]
        for holder in (module, *configs):
            for name, value in vars(holder).items():
                is_noise = "drop" in name or name in JITTER
                if is_noise and isinstance(value, float):
                    setattr(holder, name, 0.0)


def warn_of_noise(differences, logprobs, allowed):
    """Warn if log-probabilities that one set of weights gave twice differ: by this fraction."""
    noise = (differences.abs().mean() / logprobs.abs().mean()).item()
    if noise > allowed:
        warnings.warn(f"before the first optimizer step log-probabilities differ by {noise:.1%}: "
                      "in train mode this model draws random numbers (dropout, or "
                      "experts chosen at random), so losses and ratios are noisy", stacklevel=3)


# ----------------------------------------------------------------------------- value heads
class ValueHead(nn.Module):
    """V(s_t), one number per token: hidden states [..., D] -> values [..., 1] in float32.

    It starts at zero (Ziegler et al. 2019): the first returns are then the rewards alone."""

    def __init__(self, config, summary_dropout_prob=None, hidden_size=None):
        super().__init__()
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", None) or 0.0
        self.dropout = nn.Dropout(summary_dropout_prob)
        self.summary = nn.Linear(hidden_size or config.hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.summary(self.dropout(hidden_states.to(self.summary.weight.dtype)))


class PreTrainedModelWrapper(nn.Module):
    """A language model with a value head on its last hidden states.

    `pretrained_model` is the transformers model (or PeftModel), `v_head` the ValueHead.
    `state_dict()` has the model's own names, without a prefix, and `v_head.*`."""

    transformers_parent_class = None
    lm_head_namings = ["lm_head", "embed_out"]

    def __init__(self, pretrained_model, summary_dropout_prob=None):
        super().__init__()
        head = pretrained_model.get_output_embeddings()
        if head is None:
            names = ", ".join(self.lm_head_namings)
            raise ValueError(f"{type(pretrained_model).__name__} has no language modeling head "
                             f"({names}, ...); load a model that "
                             f"{self.transformers_parent_class.__name__} opens")
        self.pretrained_model = pretrained_model
        self.is_peft_model = hasattr(pretrained_model, "peft_config")
        self.v_head = ValueHead(self.config, summary_dropout_prob, hidden_size=head.weight.shape[1])
        self.v_head.to(head.weight.device)
        self._renaming = [self.register_state_dict_post_hook(_without_prefix),
                          self.register_load_state_dict_pre_hook(_with_prefix)]

    config = property(lambda self: self.pretrained_model.config)
    generation_config = property(lambda self: self.pretrained_model.generation_config)
    device = property(lambda self: self.v_head.summary.weight.device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, peft_config=None,
                        is_trainable=False, reward_adapter=None, summary_dropout_prob=None,
                        require_v_head=None, **kwargs):
        """Load a model with its value head, or put a new head on a model. Raises ValueError.

        pretrained_model_name_or_path: a model object, a hub name or a folder (a plain model, one
            saved by `save_pretrained` here or by TRL 0.7, sharded or not, or a PEFT adapter).
        peft_config: put a fresh adapter on the model. is_trainable: train a loaded adapter further.
        reward_adapter: a sequence classifier's LoRA adapter, for `compute_reward_score`.
        require_v_head: True: raise if no head was saved; None: warn; False: expect a new head.
        All other arguments go to the transformers class."""
        model, head = pretrained_model_name_or_path, None
        hub = hub_arguments(kwargs)
        if isinstance(model, (str, Path)):
            name, auto_class = str(model), cls.transformers_parent_class
            model = load_pretrained(auto_class, name, is_trainable, *args, **kwargs)
            head = read_value_head(name, **hub)
            if head is None and require_v_head is not False:
                missing = f"{name} holds no value head: it starts at zero"
                if require_v_head:
                    raise ValueError(missing)
                warnings.warn(missing, stacklevel=2)
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        wrapped = cls(model, summary_dropout_prob)
        if head is not None:
            wrapped.v_head.load_state_dict(head)
        if reward_adapter is not None:
            hub.pop("revision", None)  # it is the model's
            wrapped._add_reward_adapter(str(reward_adapter), **hub)
        return wrapped

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """Return logits [B, T, V] in float32, the loss or None, and values [B, T].

        logits_to_keep=k: logits of the last k columns only; values are those of all columns."""
        kwargs.setdefault("use_cache", "past_key_values" in kwargs)
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask,
                                       output_hidden_states=True, **kwargs)
        seq2seq = self.config.is_encoder_decoder
        hidden_states = output.decoder_hidden_states if seq2seq else output.hidden_states
        # FSDP takes no view as an output: clone
        values = self.v_head(hidden_states[-1]).squeeze(-1).clone()
        return output.logits.float(), output.loss, values

    def generate(self, *args, **kwargs):
        """Call the language model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """Recompute activations in the backward pass; non-reentrant, as frozen embeddings need."""
        kwargs = gradient_checkpointing_kwargs or {"use_reentrant": False}
        self.pretrained_model.gradient_checkpointing_enable(kwargs)

    def keep_module_names(self):
        """From now on name weights as the modules do (`pretrained_model.*`), for FSDP."""
        for hook in self._renaming:
            hook.remove()

    def save_pretrained(self, save_directory, state_dict=None, **kwargs):
        """Write the model (or only its adapter) and the value head. Call on one rank.

        The folder opens as the plain model and as this class. state_dict: the gathered
        `self.state_dict()`, if the weights are sharded."""
        state_dict = state_dict or self.state_dict()
        state_dict = {k.removeprefix("pretrained_model."): v for k, v in state_dict.items()}
        head = {k: v.contiguous() for k, v in state_dict.items() if k.startswith("v_head.")}
        body = {k: v for k, v in state_dict.items() if not k.startswith(("v_head.", "score."))}
        if self.is_peft_model:
            kwargs.setdefault("selected_adapters", [self.pretrained_model.active_adapter])
        os.makedirs(save_directory, exist_ok=True)
        self.pretrained_model.save_pretrained(save_directory, state_dict=body, **kwargs)
        save_file(head, os.path.join(save_directory, VALUE_HEAD_FILE))

    def push_to_hub(self, repo_id, commit_message="Upload model with value head", private=None,
                    token=None, **kwargs):
        """Upload what `save_pretrained` writes to the hub's repository `repo_id`."""
        from huggingface_hub import HfApi
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder,
                                     commit_message=commit_message)

    def _add_reward_adapter(self, folder, **hub):
        if not self.is_peft_model:
            raise ValueError("reward_adapter needs a policy with an adapter of its own "
                             "(peft_config): both share one base model")
        from peft.utils import load_peft_weights
        policy = self.pretrained_model.active_adapter
        self.pretrained_model.load_adapter(folder, adapter_name="reward", is_trainable=False, **hub)
        self.pretrained_model.set_adapter(policy)
        weights = load_peft_weights(folder, device="cpu", **hub)
        weights = [v for k, v in weights.items() if k.endswith("score.weight")]
        if not weights:
            raise ValueError(f"reward_adapter {folder}: no weights of a score layer; train it as a "
                             "sequence classifier")
        self.score = nn.Linear(weights[0].shape[1], weights[0].shape[0], bias=False)
        self.score.load_state_dict({"weight": weights[0]})
        self.score.requires_grad_(False)

    @torch.no_grad()
    def compute_reward_score(self, input_ids, attention_mask=None, **kwargs):
        """Compute the reward adapter's scores at every token [B, T, labels].

        The score of a row is the one at its last token that is not padding."""
        with active_adapter(self.pretrained_model, "reward"):
            output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask,
                                           use_cache=False, output_hidden_states=True, **kwargs)
        return self.score(output.hidden_states[-1].to(self.score.weight.dtype))


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder-only language model (GPT-2, Llama, Qwen, ...) with a value head."""
    transformers_parent_class = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model (T5, BART, ...) with a value head on the decoder."""
    transformers_parent_class = AutoModelForSeq2SeqLM


def _without_prefix(module, state_dict, prefix, local_metadata):
    for key in [k for k in state_dict if k.startswith(prefix + "pretrained_model.")]:
        state_dict[prefix + key[len(prefix + "pretrained_model."):]] = state_dict.pop(key)


def _with_prefix(module, state_dict, prefix, *args):
    for key in [k for k in state_dict if k.startswith(prefix)]:
        if not key.startswith((prefix + "v_head.", prefix + "score.")):
            state_dict[prefix + "pretrained_model." + key[len(prefix):]] = state_dict.pop(key)


def read_value_head(name, **hub):
    """Read a value head's weights {"summary.weight", "summary.bias"}, or return None.

    name: a folder or hub name, downloaded with the arguments `hub`. The head is in a file of its
    own or, of TRL 0.7, in the model's file or one of its shards (next to an adapter:
    pytorch_model.bin)."""
    for patterns in (["model*.safetensors", VALUE_HEAD_FILE], ["pytorch_model*.bin"]):
        folder = name
        if not os.path.isdir(name):
            from huggingface_hub import snapshot_download
            folder = snapshot_download(name, allow_patterns=patterns, **hub)
        files = [file for pattern in patterns for file in sorted(Path(folder).glob(pattern))]
        heads = [read_tensors(file, "v_head.") for file in files]
        if files:  # the .bin files of such a folder hold the same weights again
            return next((head for head in heads if head), None)
    return None


def read_tensors(file, prefix):
    """Read the tensors whose names begin with the prefix, as {name without it: tensor}."""
    if file.suffix == ".bin":
        # of a whole model's file only these tensors are read
        weights = torch.load(file, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(file))
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    with safe_open(file, "pt") as weights:
        names = [k for k in weights.keys() if k.startswith(prefix)]
        return {k.removeprefix(prefix): weights.get_tensor(k) for k in names}


# ----------------------------------------------------------------------------- the reference
def create_reference_model(model, num_shared_layers=None, pattern=None):
    """Return a frozen copy of `model`, in eval mode. Raises ValueError.

    num_shared_layers: share everything below the decoder's layer of this number (embeddings, and
        the encoder if there is one) with the model, frozen in both. None: a full copy.
    pattern: how layers are named, such as "transformer.h.{layer}". None: found in the model."""
    if num_shared_layers is None:
        return copy.deepcopy(model).requires_grad_(False).eval()
    if pattern is None:
        inner = model.pretrained_model if isinstance(model, PreTrainedModelWrapper) else model
        stacks = [m for m in inner.get_decoder().modules() if isinstance(m, nn.ModuleList)]
        if not stacks:
            raise ValueError(f"num_shared_layers={num_shared_layers}: the layers of a "
                             f"{type(inner).__name__} were not found; give the pattern of their "
                             "names to create_reference_model, and what it returns as ref_model")
        stack = stacks[0]
        pattern = next(name for name, m in model.named_modules() if m is stack) + ".{layer}"
    parameters = list(model.named_parameters())
    first = pattern.format(layer=num_shared_layers) + "."
    cut = next((i for i, (name, _) in enumerate(parameters) if first in name), None)
    if cut is None:
        raise ValueError(f"num_shared_layers={num_shared_layers}: no parameter is named *{first}*; "
                         "give a smaller number, or the pattern of the layers' names")
    # OPT declares the norm behind its layers before them
    last = pattern.partition("layers.{layer}")[0] + "final_layer_norm."
    shared = [p for name, p in parameters[:cut] if last not in name]
    # deepcopy takes what its memo holds as copied already: these parameters stay the very same
    return copy.deepcopy(model, {id(p): p for p in shared}).requires_grad_(False).eval()


def copy_adapter(model, name="reference"):
    """Put a frozen copy of a PeftModel's active adapter next to it, under this name."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    policy = model.active_adapter
    config = copy.copy(model.peft_config[policy])
    config.inference_mode = True
    config.init_lora_weights = True  # PiSSA, OLoRA: they would change the base weights once more
    if getattr(config, "bias", "none") != "none":
        raise InputError(f"bias={config.bias!r} (peft_config): it trains weights that policy and "
                         "reference share; set bias='none', or give a ref_model")
    with explain("peft_config: the adapter can't be copied as the reference; give a ref_model"):
        model.add_adapter(name, config)
    weights = get_peft_model_state_dict(model, adapter_name=policy)
    set_peft_model_state_dict(model, weights, adapter_name=name)  # copies the values
    model.set_adapter(policy)
    for key, parameter in model.named_parameters():  # set_adapter forgets virtual tokens
        if f".{name}." in key:
            parameter.requires_grad_(False)


@contextmanager
def active_adapter(model, name):
    """Use the adapter of this name inside; the PeftModel's own is active again afterwards."""
    own = model.active_adapter
    model.set_adapter(name)
    try:
        yield model
    finally:
        model.set_adapter(own)


# ----------------------------------------------------------------------------- sampling
REFUSED = {  # argument: (the value that is allowed, why no other is)
    "return_dict_in_generate": (False, "generate returns token ids; for scores call the model's"),
    "num_return_sequences": (1, "generate gives one response per prompt; repeat the prompt"),
    "generation_config": (None, "give its settings one by one (max_new_tokens=...)"),
}


@torch.no_grad()
def generate(model, prompts, tokenizer, batch_size=4, policy_temperature=1.0, length_sampler=None,
             **kwargs):
    """Generate one response per prompt. Returns a list of LongTensors [response_length].

    model: a language model, with or without a value head. prompts: a list of LongTensors
    [prompt_length]. A response ends with its first end token: the tokenizer's, the model's, or one
    of kwargs["eos_token_id"]. An encoder-decoder's begins with the decoder's start token.
    policy_temperature: of the policy softmax(logits / temperature) that is scored; sampling uses it
    too, unless kwargs gives another. length_sampler: called once per batch for max_new_tokens.
    kwargs: for the model's `generate`. Raises ValueError."""
    for name, (allowed, reason) in REFUSED.items():
        if kwargs.get(name, allowed) != allowed:
            raise ValueError(f"{name}={kwargs[name]}: {reason}")
    seq2seq = model.config.is_encoder_decoder
    language_model = getattr(model, "pretrained_model", model)
    if len({len(prompt) for prompt in prompts}) > 1:
        refuse_virtual_tokens(language_model)
    own = language_model.generation_config
    settings, kwargs = sampling_settings(own, policy_temperature, kwargs)
    end_ids = end_token_ids(tokenizer, own.eos_token_id, kwargs.get("eos_token_id"))
    fill = padding_token_id(tokenizer, end_ids)
    kwargs.update(eos_token_id=sorted(end_ids) or None, pad_token_id=fill)
    stop_fill = fill if kwargs.get("stop_strings") or kwargs.get("stopping_criteria") else None
    # positions count from the first token of a decoder's prompt, so its padding is on the left
    side = "right" if seq2seq else "left"
    if model.config.model_type == "recurrent_gemma":
        batch_size = 1  # its state reads padding
    responses = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    language_model.generation_config = settings
    try:
        for batch in split(by_length, batch_size):
            rows = [prompts[i] for i in batch]
            ids = pad_sequence(rows, True, fill, side).to(model.device)
            ones = [torch.ones_like(row) for row in rows]
            mask = pad_sequence(ones, True, 0, side).to(model.device)
            if length_sampler is not None:
                kwargs["max_new_tokens"] = length_sampler()
            output = model.generate(input_ids=ids, attention_mask=mask, **kwargs)
            if not seq2seq:
                output = output[:, ids.shape[1]:]
            for i, row in zip(batch, output, strict=True):
                responses[i] = cut_response(row, end_ids, int(seq2seq), stop_fill)
    finally:
        model.train(was_training)
        language_model.generation_config = own
        if hasattr(language_model, "peft_config"):  # PEFT hands it on to the base model
            language_model.get_base_model().generation_config = own
    return responses


def refuse_virtual_tokens(model):
    """Raise InputError for prompt tuning and P-tuning (not prefix tuning: it fills the cache)."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter and adapter.is_prompt_learning and adapter.peft_type != "PREFIX_TUNING":
        raise InputError(f"peft_config={type(adapter).__name__}: padding next to its virtual "
                         "tokens changes samples and scores; use LoRA or prefix tuning")


def end_token_ids(tokenizer, *ids):
    """Collect the ids that end a response: the tokenizer's, its chat template's, and `ids`.

    ids: one, a list or None each."""
    ends = {tokenizer.eos_token_id, chat_end_id(tokenizer)}
    for one_or_more in ids:
        ends.update(one_or_more if isinstance(one_or_more, (list, tuple)) else [one_or_more])
    return ends - {None}


def cut_response(response, end_ids, first, fill):
    """Cut a response [T] after its first end token at position `first` or later.

    fill: the token that fills a row after a stop string, which is cut off; or None."""
    tokens = response.tolist()
    for i, token in enumerate(tokens[first:], start=first):
        if token in end_ids:
            return response[:i + 1]
    length = len(tokens)
    while length > first + 1 and tokens[length - 1] == fill:
        length -= 1
    return response[:length]


def padding_token_id(tokenizer, end_ids):
    """Return a token id that ends no text: that of the pad token, BOS, ..., a null character."""
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id,
           *tokenizer("\0", add_special_tokens=False).input_ids]
    for token_id in ids:
        if token_id is not None and token_id not in end_ids:
            return token_id
    raise InputError(f"tokenizer {tokenizer.name_or_path}: each token that could pad also ends "
                     "texts; set another tokenizer.pad_token")


HARMLESS = (  # arguments that leave the distribution of the next token as it is
    "do_sample", "num_beams", "max_new_tokens", "max_length", "max_time", "stop_strings",
    "stopping_criteria", "tokenizer", "streamer", "synced_gpus", "use_cache", "past_key_values",
    "cache_implementation", "cache_config", "bos_token_id", "eos_token_id", "pad_token_id",
    "decoder_start_token_id", "decoder_input_ids", *REFUSED)
RESHAPING = (  # arguments that only generate's own sampling reads
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
OFF = (None, False, 0, -1)  # so TRL 0.7's examples write it
OFF_AT_ONE = ("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale")


def sampling_settings(own, temperature, kwargs):
    """Return the generation config to use, and the arguments of `generate`.

    Sampling draws from softmax(logits / temperature), the policy that is scored, whatever top-k,
    beams or penalties the model's own config has. Those in kwargs are used, with a warning."""
    if not kwargs.get("do_sample", own.do_sample):
        return own, kwargs
    if kwargs.get("num_beams", 1) != 1:
        raise ValueError("num_beams: a rollout is one sampled response per prompt, without beams")
    kept = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "max_new_tokens",
            "max_length")
    settings = GenerationConfig(**{name: getattr(own, name) for name in kept})
    plain = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    given = {**plain, **kwargs}
    given["temperature"] = float(given["temperature"] or temperature)  # generate refuses an int
    names = [name for name in given if name not in HARMLESS]
    changes = {name: given[name] for name in names if not is_off(name, given[name], plain)}
    if changes:
        warnings.warn(f"responses are sampled with {changes} and scored with temperature "
                      f"{temperature} alone: ratio and KL are those of another policy",
                      stacklevel=4)
    if set(changes) & set(RESHAPING):
        return settings, given
    draw = [*kwargs.get("logits_processor", []), TemperatureLogitsWarper(float(temperature)),
            SampleToken()]
    kwargs = {name: value for name, value in kwargs.items() if name not in plain}
    # SampleToken leaves one token: greedy decoding takes it
    return settings, {**kwargs, "logits_processor": LogitsProcessorList(draw), "do_sample": False}


def is_off(name, value, plain):
    """Return whether an argument of `generate` has the value that changes nothing.

    plain: {name: this value} of some arguments; None changes nothing there, too."""
    if name in plain:
        return value in (plain[name], None)
    if isinstance(value, (list, tuple, dict)):
        return not value
    return value in OFF or (value == 1 and name in OFF_AT_ONE)


class SampleToken(LogitsProcessor):
    """Sample the next token by inverting the CDF, and leave no other for greedy decoding.

    torch.multinomial draws one exponential per entry of the vocabulary: a third of a rollout's
    time on CPUs."""

    def __call__(self, input_ids, scores):
        cdf = scores.softmax(dim=-1).cumsum(dim=-1)
        uniform = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]
        token = torch.searchsorted(cdf, uniform, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


# =============================================================================
# Part 2, the machinery: nothing below is needed to understand an algorithm.
# =============================================================================

# ----------------------------------------------------------------------------- the command line
def run(main, config_class, toy="", own="", lora=""):
    """Run a script's command line: parse the flags of `config_class`, call `main(config)`.

    toy, own, lora: flags that hold unless the user gives others, for the toy model, for all other
    models, and for a LoRA of one.
    An InputError ends the process with its one sentence and status 1; any other error keeps its
    traceback. torchrun stops the other ranks as soon as one has failed."""
    import datasets
    import transformers
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory")  # Trainer asks for it on CPUs too
    # peft reads a property of models by its old name, and finds out about GPT-2's layers itself
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
    setup_ranks()  # first: a config of Trainer's looks for devices and ranks as soon as it is made
    flags = tyro.constructors.ConstructorRegistry()
    flags.primitive_rule(json_flag)
    words = [*default_flags(sys.argv[1:], toy, own, lora), *sys.argv[1:]]  # the last one counts
    config = tyro.cli(config_class, description=main.__doc__.split("\n\n")[0], registry=flags,
                      args=words)
    try:
        record(main)(config)
    except InputError as error:
        sentence = f"{Path(sys.argv[0]).name}: error: {error}"
        get_error_handler().record_exception(InputError(sentence))  # torchrun prints it last
        sys.exit(sentence)
    # only after success: while another rank waits in a collective, this call could wait for it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def default_flags(words, toy, own, lora):
    """Return the default flags for the model that `words` name; print them unless it is the toy."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-name", "--model_name")
    parser.add_argument("--lora-r", "--lora_r", default="0")
    model, _ = parser.parse_known_args(words)
    if model.model_name in (None, "None"):
        return toy.split()
    if model.lora_r != "0" or Path(model.model_name, "adapter_config.json").is_file():
        own = f"{own} {lora}"
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--per-device-train-batch-size" in given:  # steps of this size, unless the user says more
        given.add("--gradient-accumulation-steps")
    flags = [flag for flag in re.findall(r"--\S+ [^-]\S*", own) if flag.split()[0] not in given]
    if flags:
        print_once(f"defaults for this model: {' '.join(flags)}")
    return " ".join(flags).split()


def print_once(line):
    """Print a line on the main rank, before or after there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def json_flag(field):
    """Tell tyro how to read a field that takes a dict or a file's name, such as --fsdp-config."""
    from tyro.constructors import PrimitiveConstructorSpec
    if not any(dict in (kind, get_origin(kind)) for kind in get_args(field.type)):
        return None

    def read(words):
        return json.loads(words[0]) if words[0].startswith("{") else words[0]

    return PrimitiveConstructorSpec(
        nargs=1, metavar="JSON|FILE", instance_from_str=read,
        is_instance=lambda value: isinstance(value, (dict, str, type(None))),
        str_from_instance=lambda value: [json.dumps(value)])


@contextmanager
def explain(what):
    """Turn any error inside into an InputError: `what`, the error's first line, and its place."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"{type(error).__name__}, {Path(place.filename).name}:{place.lineno}"
        raise InputError(f"{what}: {reason} ({where})") from error


def check_ranges(config, intervals):
    """Raise InputError for a field outside its interval, such as {"[0, 1]": ("gamma", "lam")}.

    A round bracket excludes its bound. A field that is None is not checked."""
    for interval, names in intervals.items():
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        for name in names:
            value = getattr(config, name)
            if value is None:
                continue
            above = value > low or (value == low and interval[0] == "[")
            below = value < high or (value == high and interval[-1] == "]")
            if not (above and below):
                raise InputError(f"{name}={value}: give a number in {interval}")


def check_arguments(name, arguments, function):
    """Raise InputError if the dict `arguments`, the option `name`, holds one function lacks."""
    known = inspect.signature(function).parameters
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise InputError(f"{name}={arguments}: {function.__name__} has no argument "
                         f"{', '.join(unknown)}; its arguments are {', '.join(known)}")


DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_choices(config, choices):
    """Raise InputError for a field that is none of its choices, such as {"torch_dtype": DTYPES}."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}")


def read_settings(trainer_class, args, **arguments):
    """Merge a trainer's constructor arguments with its config. Returns {name: value}.

    An argument that differs from its default wins over the config's field of the same name. Raises
    InputError if the field differs from its default too, and from the argument."""
    parameters = inspect.signature(trainer_class.__init__).parameters
    defaults = {field.name: field.default for field in fields(args)}
    settings = {}
    for name, value in arguments.items():
        is_given = value != parameters[name].default
        in_config = getattr(args, name, None)
        if is_given and in_config not in (None, defaults.get(name), value):
            raise InputError(f"{name}={value!r}, and {name}={in_config!r} in args: give it once")
        settings[name] = value if is_given or in_config is None else in_config
    return settings


# ----------------------------------------------------------------------------- data
def load_rows(name, split=None, config=None, usual=("train",), flag="dataset_split"):
    """Load the rows of one split of a dataset -> datasets.Dataset. Raises InputError.

    name: a local .jsonl, .json, .csv, .parquet or .txt file (each line is a row `text`), a folder
    written by `save_to_disk` (or any folder that `load_dataset` reads), or a name on the hub.
    split: None: the only one, or the first of `usual` that there is. flag: its name, for errors."""
    splits = load_splits(name, config)
    if split is None and len(splits) > 1:
        split = next((name for name in usual if name in splits), None)
    elif split is None:
        split, = splits
    if split not in splits:
        raise InputError(f"{flag}={split} (dataset {name}): it has the splits {', '.join(splits)}; "
                         "name one of them")
    return splits[split]


def load_splits(name, config=None):
    """Load a dataset -> {split: datasets.Dataset}; rows without a split are `train`."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet",
             ".txt": "text"}
    if path.is_file() and path.suffix not in kinds:
        raise InputError(f"data file {name}: unknown kind {path.suffix!r}; use {', '.join(kinds)}")
    if path.suffix in kinds and not path.exists():
        raise InputError(f"data file {name} does not exist here ({Path.cwd()})")
    with explain(f"dataset {name} is neither a readable file or folder nor a dataset on the hub "
                 "(one with several configurations needs --dataset-config)"):
        if path.is_file():
            return load_dataset(kinds[path.suffix], data_files=str(path))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = load_from_disk(str(path))
            return rows if isinstance(rows, DatasetDict) else {"train": rows}
        return load_dataset(str(name), config)


def map_options(args, rows, num_proc):
    """Return options for `rows.map`: a machine's first process fills the cache, the others read it.

    The cache of an earlier run is not used: the code may have changed."""
    from datasets import IterableDataset
    if isinstance(rows, IterableDataset):
        return {}
    return {"num_proc": num_proc, "load_from_cache_file": args.local_process_index > 0}


PROMPT_COLUMNS = ("query", "prompt", "messages", "text", "input_ids")


def load_prompts(name, tokenizer, max_length=None, longest=None, keep_columns=False, split=None,
                 config=None):
    """Check prompts; return their rows {"query", "input_ids", "shown", "messages", "metadata"}.

    These are the prompt's text, its token ids, what samples show of it (of a chat the last user
    turn), the messages of a chat or None, and the whole row.
    name: a dataset with a column query, prompt, messages (chat, through the tokenizer's template; a
    last turn of the assistant is dropped), text or input_ids.
    max_length: truncate texts to this many tokens, and drop longer chats. longest: raise for a
    prompt with more tokens. keep_columns: keep the other columns in the rows too. split, config:
    see load_rows. Raises InputError."""
    rows = load_rows(name, split, config)
    column = next((c for c in PROMPT_COLUMNS if c in rows.column_names), None)
    if column is None:
        raise InputError(f"dataset {name} has the columns {rows.column_names} and none of "
                         f"{', '.join(PROMPT_COLUMNS)}: rename the one that holds the prompts")
    limit = max_length or 10**9
    dropped = set()
    with explain(f"dataset {name}: column {column} can't be tokenized"):
        for number, (length, has_turns) in enumerate(prompt_lengths(rows, column, tokenizer)):
            if has_turns and length > limit:  # truncated, it would lack its generation prompt
                dropped.add(number)
                continue
            length = min(length, limit)
            if length == 0:
                raise InputError(f"dataset {name}, row {number}: {column} is empty; remove the row")
            if longest is not None and length > longest:
                raise InputError(f"dataset {name}, row {number}: {length} tokens leave no room "
                                 f"for a response, the most is {longest}; set --max-query-length "
                                 "or reduce --max-new-tokens")
    if dropped:
        warnings.warn(f"dataset {name}: dropped {len(dropped)} of {len(rows)} chats, row "
                      f"{min(dropped)} the first: they are longer than max_query_length="
                      f"{max_length} tokens", stacklevel=2)
        rows = rows.select([i for i in range(len(rows)) if i not in dropped])
    if len(rows) == 0:
        raise InputError(f"dataset {name}: no prompt is left within max_query_length={max_length} "
                         "tokens; raise it")
    return Prompts(rows, column, tokenizer, max_length, keep_columns)


def prompt_lengths(rows, column, tokenizer):
    """Yield the number of tokens of each prompt, and whether it is a chat.

    Texts are tokenized many at a time."""
    for start in range(0, len(rows), 1000):
        batch = rows.select(range(start, min(start + 1000, len(rows))))
        prompts = batch[column][:]
        if all(isinstance(prompt, str) for prompt in prompts):
            ids = tokenizer(prompts, verbose=False).input_ids
        else:
            ids = [prompt_ids(tokenizer, row[column], row) for row in batch]
        yield from zip(map(len, ids), map(is_chat, prompts), strict=True)


class Prompts(torch.utils.data.Dataset):
    """Tokenize a dataset's prompts as they are asked for: a million take no memory.

    The arguments and the rows are those of `load_prompts`. A slice is a list of rows."""

    def __init__(self, rows, column, tokenizer, max_length, keep_columns):
        self.rows, self.column, self.tokenizer = rows, column, tokenizer
        self.max_length, self.keep_columns = max_length, keep_columns

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        row, tokenizer = self.rows[i], self.tokenizer
        value = row[self.column]
        messages = question_of(value) if is_chat(value) else None
        ids = prompt_ids(tokenizer, value, row)[:self.max_length]
        query = tokenizer.decode(ids)
        prompt = {"query": query, "input_ids": ids, "messages": messages, "metadata": row,
                  "shown": text_to_show(messages or query)}
        return {**(row if self.keep_columns else {}), **prompt}


def is_chat(prompt):
    """Return whether a prompt is a list of chat messages."""
    return isinstance(prompt, list) and len(prompt) > 0 and isinstance(prompt[0], dict)


def question_of(messages):
    """Return chat messages without a last turn of the assistant: it is for the policy to write."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def prompt_ids(tokenizer, prompt, row=None):
    """Tokenize a prompt: a text, chat messages, or token ids as they are. row: see chat_ids."""
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False).input_ids
    if is_chat(prompt):
        return chat_ids(tokenizer, question_of(prompt), row, add_generation_prompt=True)
    return list(prompt or [])


def text_to_show(prompt):
    """Return what samples show of a prompt: of a chat the last user turn, else its text."""
    if not is_chat(prompt):
        return prompt or ""  # a chat without messages is an empty list
    turns = [turn["content"] for turn in prompt if turn["role"] == "user"]
    return str((turns or [prompt[-1]["content"]])[-1])


# ----------------------------------------------------------------------------- chats
MARK = "\ue000"  # a character that no text has
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # around what the assistant writes


def apply_template(tokenizer, messages, row=None, **options):
    """Apply the tokenizer's chat template to messages. Raises InputError if it has none.

    row: its `tools` and `chat_template_kwargs` reach the template."""
    if tokenizer.chat_template is None:
        raise InputError("chat_template=None (tokenizer): the rows are chats; set "
                         "tokenizer.chat_template, or give texts")
    row = without_nulls({name: (row or {}).get(name) for name in ("tools", "chat_template_kwargs")})
    return tokenizer.apply_chat_template(without_nulls(messages), tools=row.get("tools"),
                                         **row.get("chat_template_kwargs", {}), **options)


def without_nulls(value):
    """Drop what is None from dicts, at any depth: Arrow fills in the keys that other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def render_chat(tokenizer, messages, row=None, add_generation_prompt=False):
    """Render chat messages as text. A whole chat ends with its last special token.

    The white space that many templates write after it is never sampled."""
    text = apply_template(tokenizer, messages, row, tokenize=False,
                          add_generation_prompt=add_generation_prompt)
    stripped = text.rstrip()
    is_ended = not add_generation_prompt and stripped.endswith(special_tokens(tokenizer))
    return stripped if is_ended else text


def special_tokens(tokenizer):
    """Return the texts of the tokenizer's special tokens, a tuple."""
    return read_special_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def read_special_tokens(tokenizer, vocab_size):
    """Read them once: the 6,000 of Gemma 3 take longer than 50 chats."""
    return tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def chat_ids(tokenizer, messages, row=None, add_generation_prompt=False):
    """Return the token ids of chat messages."""
    text = render_chat(tokenizer, messages, row, add_generation_prompt)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def tokenize_chat(tokenizer, messages, row=None, first=0):
    """Tokenize a chat. Returns its ids [T], and a mask [T] of what the assistant writes in it.

    The mask is 1 in the assistant's turns from message `first` on: after the generation prompt, up
    to and with the turn's end token. It is 0 for a turn that the rendered chat does not have. A
    template with {% generation %} marks itself says what the assistant writes."""
    text = render_chat(tokenizer, messages, row)
    warn_of_lost_thinking(text, messages)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    header = generation_prompt(tokenizer, row)
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    spans = [span_of_turn(tokenizer, text, messages, i, header, row) for i in turns]
    spans = [span for span in spans if span is not None]
    is_marked = GENERATION_MARK.search(tokenizer.get_chat_template())
    if is_marked and spans:
        marks = apply_template(tokenizer, messages, row, tokenize=True, return_dict=True,
                               return_assistant_tokens_mask=True)["assistant_masks"]
        pairs = zip(marks, tokens.offset_mapping, strict=False)
        return tokens.input_ids, [int(mark and end > spans[0][0]) for mark, (_, end) in pairs]
    mask = [0] * len(tokens.input_ids)
    for start, end in spans:
        warn_of_missing_end(tokenizer, text[:end])
        for t, (left, right) in enumerate(tokens.offset_mapping):
            if left < end and right > start:
                mask[t] = 1
    return tokens.input_ids, mask


def split_chat(tokenizer, prompt, answer, row=None):
    """Render a chat, and split the text where the first message of `answer` begins.

    prompt, answer: messages. The assistant writes the answer's first message."""
    messages = prompt + answer
    text = render_chat(tokenizer, messages, row)
    warn_of_lost_thinking(text, messages)
    warn_of_missing_end(tokenizer, text)
    header = generation_prompt(tokenizer, row)
    span = span_of_turn(tokenizer, text, messages, len(prompt), header, row)
    if span is None:
        raise InputError(f"chat_template (tokenizer): it leaves out the answer {answer[0]}; remove "
                         "the row, or give texts")
    return text[:span[0]], text[span[0]:]


def span_of_turn(tokenizer, whole, messages, i, header, row=None):
    """Return where the assistant's message i begins and ends in `whole`, the rendered chat.

    header: what the template writes before an answer, see generation_prompt. Templates rewrite
    earlier turns (Qwen3 drops their thinking), so the turn is looked for in the whole chat. None:
    the template leaves it out."""
    content = span_of_content(tokenizer, whole, messages, i, row)
    if content is None:
        return None
    # 1. It begins after its generation prompt, or what is left of that in the whole chat
    start = content[0]
    previous = span_of_content(tokenizer, whole, messages, i - 1, row) if i else None
    between = whole[previous[1] if previous else 0:content[0]]
    for length in range(len(header), len(header) // 2, -1):
        place = between.rfind(header[:length])
        if place >= 0:
            start = content[0] - len(between) + place + length
            break
    if i and not header:
        until_here = render_chat(tokenizer, messages[:i], row, add_generation_prompt=True)
        start = len(until_here) if whole.startswith(until_here) else start
    # 2. It ends where the chat up to here does, or with the first special token after its content
    until_here = render_chat(tokenizer, messages[:i + 1], row)
    if whole.startswith(until_here):
        return start, len(until_here)
    rest = whole[content[1]:]
    ends = [rest.find(token) + len(token) for token in special_tokens(tokenizer) if token in rest]
    return start, content[1] + min(ends, default=0)


def span_of_content(tokenizer, whole, messages, i, row=None):
    """Return where the content of message i begins and ends in `whole`, the rendered chat.

    It is what changes when its texts do. None: the template leaves it out."""
    changed = [*messages[:i], replace_texts(messages[i]), *messages[i + 1:]]
    other = render_chat(tokenizer, changed, row)
    if MARK not in other:
        return None
    start = len(os.path.commonprefix([whole, other]))
    end = len(os.path.commonprefix([whole[start:][::-1], other[start:][::-1]]))
    return start, len(whole) - end


def replace_texts(value):
    """Replace the texts of a message, but not those that say what kind of message it is."""
    kinds = ("role", "type", "id", "name", "tool_call_id")
    if isinstance(value, dict):
        return {key: item if key in kinds and isinstance(item, str) else replace_texts(item)
                for key, item in value.items()}
    if isinstance(value, list):
        return [replace_texts(item) for item in value]
    return MARK if isinstance(value, str) else value


def generation_prompt(tokenizer, row=None):
    """Return what the template writes before an answer, from its first visible character on."""
    question = [{"role": "user", "content": MARK}]
    without = render_chat(tokenizer, question, row)
    prompt = render_chat(tokenizer, question, row, add_generation_prompt=True)
    return prompt[len(os.path.commonprefix([prompt, without])):].lstrip()


def chat_end_id(tokenizer):
    """Return the special token with which the template ends an answer, or None."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    rest = render_chat(tokenizer, chat).rpartition(MARK)[2].lstrip()
    ends = [token for token in special_tokens(tokenizer) if rest.startswith(token)]
    return tokenizer.convert_tokens_to_ids(max(ends, key=len)) if ends else None


def warn_of_missing_end(tokenizer, text):
    """Warn of a chat whose answer ends with no special token: the model does not learn to end."""
    if not text.endswith(special_tokens(tokenizer)):
        warnings.warn("chat_template (tokenizer): it writes no end token after an answer, so the "
                      "model does not learn to end; set a template that does", stacklevel=2)


def warn_of_lost_thinking(text, messages):
    """Warn of a rendered chat without the thinking that its messages have."""
    thoughts = []
    for message in messages:
        thoughts += re.findall("<think>(.*?)</think>", str(message.get("content")), re.DOTALL)
        thoughts += [message.get("reasoning_content") or "", message.get("thinking") or ""]
    if any(thought.strip() not in text for thought in thoughts):
        warnings.warn("chat_template (tokenizer): it leaves thinking out of a chat, often that of "
                      "all turns but the last; what is left out is not trained on", stacklevel=2)


def join_chat(prompt, answer):
    """Return prompt and answer as one conversation, a list of messages.

    An answer that begins with the prompt's messages, or with another role than the assistant, is
    the whole conversation already. prompt: messages, the text of a user's turn, or None."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    prompt = prompt or []
    repeats = len(answer) > len(prompt) > 0 and same_messages(prompt, answer) == len(prompt)
    if repeats or answer[:1] and answer[0]["role"] != "assistant":
        return answer
    return prompt + answer


def same_messages(first, second):
    """Count the messages with which two chats begin alike: role, text (stripped), tool calls."""
    def key(message):
        content = message.get("content") or ""
        content = content.strip() if isinstance(content, str) else content
        return message["role"], content, without_nulls(message.get("tool_calls") or [])
    pairs = zip(first, second, strict=False)
    return len(list(takewhile(lambda pair: key(pair[0]) == key(pair[1]), pairs)))


# ----------------------------------------------------------------------------- rewards
INPUTS = ("texts", "prompts", "responses", "messages", "metadata")  # of a reward


def load_function(argument, name):
    """Load `file.py:function`, whose file may import its neighbors. Raises InputError."""
    file, _, function = str(name).rpartition(":")
    with explain(f"{argument}={name} can't be loaded"):
        sys.path.insert(0, str(Path(file).resolve().parent))
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)  # worker processes find its functions by name
        spec.loader.exec_module(module)
        return getattr(module, function)


def load_reward(name, label=None, device="cpu", **kwargs):
    """Load a reward: a function of `reward_inputs` -> a list of scalar tensors. Raises InputError.

    name: `file.py:function`, or a sequence classifier's folder or hub name, whose score is the
    logit of its only label, or of `label` (name or number). The function returns one number per
    text. It gets those of the inputs that its arguments name (all, if it takes **kwargs); if the
    first has another name, it gets texts. kwargs: for the classifier's from_pretrained."""
    if str(name).rpartition(":")[0].endswith(".py"):
        if label is not None:
            raise InputError(f"reward_label={label!r} (reward_model {name}): a function has no "
                             "labels; leave it out")
        score = load_function("reward_model", name)
    else:
        score = load_classifier(name, label, device, **kwargs)
    parameters = inspect.signature(score).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes_texts = next(iter(parameters), None) not in INPUTS

    def reward(texts, **inputs):
        first = [texts] if takes_texts else []
        inputs = inputs if takes_texts else {"texts": texts, **inputs}
        named = {name: inputs[name] for name in inputs if takes_all or name in parameters}
        with explain(f"reward_model {name} failed on {len(texts)} texts, the first: {texts[0]!r}"):
            scores = score(*first, **named)
            if isinstance(scores, dict):
                raise InputError(f"reward_model {name} returned a dict: return one number per text")
            scores = [torch.tensor(float(number)) for number in scores]
        if len(scores) != len(texts):
            raise InputError(f"reward_model {name} returned {len(scores)} scores for {len(texts)} "
                             "texts: return one per text")
        return scores

    return reward


def reward_inputs(tokenizer, prompts, responses, is_encoder_decoder):
    """Return what a reward reads of prompts and their responses (ids): a dict of lists.

    prompts: rows of `load_prompts`, as columns {name: list}. Returns
    texts: prompt and response as one text; of a chat, all of it as the template writes it, with
        the end of the response, even if sampling stopped before;
    prompts, responses: the texts of each; messages: whole conversations, or None where the prompt
        is a text; metadata: the prompts' rows."""
    texts = join_texts(tokenizer, prompts["input_ids"], responses, is_encoder_decoder)
    answers = tokenizer.batch_decode(responses, skip_special_tokens=True)
    chats = []
    for i, messages in enumerate(prompts["messages"]):
        if messages is None:
            chats.append(None)
            continue
        thinking = re.search(r"<think>\s*$", prompts["query"][i])  # some templates begin it
        content = ((thinking.group() if thinking else "") + answers[i]).strip()
        chats.append([*messages, {"role": "assistant", "content": content}])
        texts[i] = render_chat(tokenizer, chats[i], prompts["metadata"][i])
    return {"texts": texts, "prompts": prompts["query"], "responses": answers, "messages": chats,
            "metadata": prompts["metadata"]}


def join_texts(tokenizer, prompts, responses, is_encoder_decoder):
    """Return each prompt (ids) with its response (ids) as one text."""
    if is_encoder_decoder:
        prompts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        responses = tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [f"{prompt} {text}" for prompt, text in zip(prompts, responses, strict=True)]
    # together: a decoder may drop the space that a text begins with
    pairs = zip(prompts, responses, strict=True)
    ids = [[*map(int, prompt), *map(int, response)] for prompt, response in pairs]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def judged_ids(tokenizer, text, row=None, max_length=None):
    """Return the token ids that a classifier reads, in training and in use.

    text: a text, or the messages of a chat. A longer one keeps its last max_length tokens, since
    the response is at the end. row: see apply_template."""
    is_text = isinstance(text, str)
    if not is_text:
        messages, text = text, render_chat(tokenizer, text, row)
        warn_of_lost_thinking(text, messages)
    return tokenizer(text, add_special_tokens=is_text, truncation=max_length is not None,
                     max_length=max_length, verbose=False).input_ids


def prepare_classifier_tokenizer(tokenizer):
    """Return a copy that pads with a token that ends no text, and truncates on the left.

    transformers reads a decoder's score at the last token that is not the pad token: with the end
    token as padding (Llama 3, Mistral, Zephyr) it would read the token before the end."""
    tokenizer = copy.deepcopy(tokenizer)
    pad_token_id = padding_token_id(tokenizer, end_token_ids(tokenizer))
    if pad_token_id != tokenizer.pad_token_id:
        # GPT-2 writes the null character as the letter Ā, which words of a text may hold
        word = AddedToken(tokenizer.convert_ids_to_tokens(pad_token_id), single_word=True,
                          normalized=False, special=True)
        pad_token = tokenizer.added_tokens_decoder.get(pad_token_id, word)
        tokenizer.add_special_tokens({"pad_token": pad_token})
    set_truncation(tokenizer, tokenizer.model_max_length)
    return tokenizer


def set_truncation(tokenizer, max_length):
    """Keep the last max_length tokens of a text; the tokenizer is saved so."""
    settings = {"truncation_side": "left", "model_max_length": max_length}
    tokenizer.init_kwargs.update(settings)  # what save_pretrained writes
    for name, value in settings.items():
        setattr(tokenizer, name, value)


def set_classifier_padding(model, tokenizer):
    """Write the tokenizer's pad token to the config of a classifier. Raises InputError."""
    config = model.config.get_text_config()
    if getattr(config, "summary_type", None) == "last":
        raise InputError(f"summary_type='last' ({config.model_type} model): it reads the score at "
                         "the last column, which may be padding; choose another classifier")
    config.pad_token_id = tokenizer.pad_token_id


JUDGED_TOKENS = 2**14  # of texts that a classifier reads at once, padding included


def load_classifier(name, label, device, **kwargs):
    """Load a sequence classifier as a function of `reward_inputs`, which returns numbers.

    It reads a chat in its own template or, if it has none, the response alone."""
    with explain(f"reward_model {name} is neither file.py:function nor a sequence classifier's "
                 "folder or hub name"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, **hub_arguments(kwargs, "trust_remote_code"))
        model = AutoModelForSequenceClassification.from_pretrained(name, **kwargs)
        model = model.to(device).eval()
    names = {str(label_name): i for i, label_name in model.config.id2label.items()}
    labels = {**{str(i): i for i in range(model.config.num_labels)}, **names}
    if model.config.num_labels > 1 and label is None:
        raise InputError(f"reward_model {name} has {model.config.num_labels} labels: choose the "
                         f"one that is the score with --reward-label, one of {', '.join(names)}")
    if label is not None and str(label) not in labels:
        raise InputError(f"reward_label {label!r} is none of {', '.join(names)}")
    column = 0 if label is None else labels[str(label)]
    given_pad, pad_id = tokenizer.pad_token, model.config.get_text_config().pad_token_id
    tokenizer = prepare_classifier_tokenizer(tokenizer)
    if tokenizer.pad_token != given_pad and pad_id in range(len(tokenizer)):
        # not trained by reward.py: its scores were read before this token, even if it ends texts
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    set_classifier_padding(model, tokenizer)
    longest = min(number_of_positions(model), tokenizer.model_max_length)

    def ids_of(text, response, messages, row):
        if messages and tokenizer.chat_template is None:
            return judged_ids(tokenizer, response, max_length=longest)
        return judged_ids(tokenizer, messages or text, row, longest)

    @torch.inference_mode()
    def score(texts, responses=None, messages=None, metadata=None):
        nothing = [None] * len(texts)
        rows = zip(texts, responses or nothing, messages or nothing, metadata or nothing,
                   strict=True)
        ids = [ids_of(*row) for row in rows]
        scores = torch.empty(len(ids))
        for batch in batches_of_similar_length([len(row) for row in ids], JUDGED_TOKENS):
            # padded on the right: GPT-2 classifiers count positions from the first column
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, padding_side="right",
                                   return_tensors="pt").to(device)
            scores[batch] = model(**inputs).logits[:, column].float().cpu()
        return scores.tolist()

    return score


# ----------------------------------------------------------------------------- models and adapters
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass(kw_only=True)
class LoadingFlags:
    """Flags of the text scripts that say how a model is loaded."""

    revision: Optional[str] = None
    """Branch, tag or commit of model_name on the hub. None: main."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model on the hub."""
    attn_implementation: Optional[str] = None
    """Attention: eager, sdpa, flash_attention_2, ... None: what transformers chooses."""


def loading_arguments(config):
    """Return the arguments of from_pretrained that a script's flags stand for."""
    flags = {field.name: getattr(config, field.name) for field in fields(LoadingFlags)}
    return {"dtype": config.torch_dtype, **{name: flag for name, flag in flags.items() if flag}}


def hub_arguments(kwargs, *others):
    """Select, from arguments of from_pretrained, those that find a file on the hub, and others."""
    return {name: kwargs[name] for name in (*HUB_ARGUMENTS, *others) if name in kwargs}


def load_tokenizer(name, **kwargs):
    """Load the tokenizer of a model's folder or hub name, with a pad token.

    kwargs: those for the model's from_pretrained."""
    kwargs = hub_arguments(kwargs, "trust_remote_code")
    return with_padding(AutoTokenizer.from_pretrained(name, **kwargs))


def with_padding(tokenizer):
    """Return the tokenizer, or a copy that pads with its end token. Raises InputError.

    Masks come from lengths, never from `id == pad`, so a model still learns to end."""
    if tokenizer.pad_token is not None:
        return tokenizer
    if tokenizer.eos_token is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has neither a pad token nor an "
                         "end-of-sequence token: set tokenizer.pad_token")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name, **kwargs):
    """Load the configuration of a model, of a LoRA adapter that of its base model."""
    base, kwargs = base_of(name, **kwargs)
    return AutoConfig.from_pretrained(base, **hub_arguments(kwargs, "trust_remote_code"))


def load_language_model(name, **kwargs):
    """Load a tokenizer and a language model by hub name or folder. Raises InputError."""
    with explain(f"model_name {name} can't be loaded"):
        return load_tokenizer(name, **kwargs), load_model(name, **kwargs)


def load_model(name, is_encoder_decoder=None, **kwargs):
    """Load a language model, or an adapter on one, which trains further.

    is_encoder_decoder: None: what its configuration says."""
    if is_encoder_decoder is None:
        is_encoder_decoder = load_config(name, **kwargs).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return load_pretrained(auto_class, name, True, **kwargs)


def load_pretrained(auto_class, name, is_trainable, *args, **kwargs):
    """Load a plain model, or base model and adapter if `name` is an adapter."""
    base, base_kwargs = base_of(name, **kwargs)
    model = auto_class.from_pretrained(base, *args, **base_kwargs)
    if base == name:
        return model
    from peft import PeftModel
    return PeftModel.from_pretrained(
        model, name, is_trainable=is_trainable, **hub_arguments(kwargs))


def load_sequence_classifier(name, **kwargs):
    """Load a classifier to train; a language model gets a fresh head with one label.

    An adapter of a classifier trains further. One of a language model is merged into its base
    model: the fresh head then reads what the adapter has learned."""
    has_head = "SequenceClassification" in str(load_config(name, **kwargs).architectures)
    head = {} if has_head else {"num_labels": 1}
    base, base_kwargs = base_of(name, **kwargs)
    task_type = "SEQ_CLS"
    if base != name:
        from peft import PeftConfig
        task_type = PeftConfig.from_pretrained(name, **hub_arguments(kwargs)).task_type
    if task_type in ("SEQ_CLS", None):
        return load_pretrained(AutoModelForSequenceClassification, name, True, **head, **kwargs)
    merged = load_pretrained(AutoModelForCausalLM, name, False, **kwargs).merge_and_unload()
    model = AutoModelForSequenceClassification.from_pretrained(base, **head, **base_kwargs)
    model.base_model.load_state_dict(merged.base_model.state_dict())
    return model


def base_of(name, **kwargs):
    """Return the base model of a LoRA adapter and its arguments; of another model its own."""
    from transformers.utils import find_adapter_config_file
    hub = hub_arguments(kwargs)
    if find_adapter_config_file(name, **hub) is None:
        return name, kwargs
    from peft import PeftConfig
    config = PeftConfig.from_pretrained(name, **hub)
    return config.base_model_name_or_path, {**kwargs, "revision": config.revision}


def number_of_positions(model):
    """Return how many tokens a row of this model can have; 10**9 if it has no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            positions -= module.padding_idx + 1  # RoBERTa's first position comes after this one
    return positions


def longest_prompt(model, max_new_tokens):
    """Return how many tokens a prompt may have, so that the response has room."""
    positions = number_of_positions(model)
    return positions if model.config.is_encoder_decoder else positions - max_new_tokens


def lora_config(config, is_encoder_decoder=False):
    """Make a peft LoraConfig for all linear layers from config's lora_r, lora_alpha; None if 0."""
    if not getattr(config, "lora_r", 0):  # plain TrainingArguments have none
        return None
    from peft import LoraConfig
    task_type = "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear",
                      task_type=task_type)


def with_adapter(model, peft_config, seed=None):
    """Put a fresh adapter on the model; equal seeds draw equal ones. Raises InputError."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    if hasattr(model, "peft_config"):
        raise InputError("peft_config: the model has an adapter already; give one or the other")
    if getattr(model, "is_quantized", False):  # Trainer's own switch turns checkpointing on
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    unread = freeze_beyond_text(model)
    if unread and hasattr(peft_config, "exclude_modules"):
        peft_config = copy.copy(peft_config)
        peft_config.exclude_modules = peft_config.exclude_modules or unread
    if seed is not None:
        set_seed(seed)
    return get_peft_model(model, peft_config)


def freeze_beyond_text(model):
    """Freeze what text does not reach, such as a vision tower. Returns its modules' names.

    On several ranks DDP would wait for its gradients."""
    config, text = model.config, model.config.get_text_config()
    if config.is_encoder_decoder or text is config:
        return []
    backbone, decoder = model.base_model, model.get_decoder()
    for parameter in set(backbone.parameters()) - set(decoder.parameters()):
        parameter.requires_grad_(False)
    unread = set(backbone.modules()) - set(decoder.modules())
    return [name for name, module in model.named_modules() if module in unread]


def prepare_training(model, peft_config=None, seed=None):
    """Prepare a model for training, with a fresh adapter if peft_config is given.

    Freezes what text does not reach. A head that is trained next to a frozen base becomes float32.
    Raises InputError if nothing would train."""
    if peft_config is not None:
        model = with_adapter(model, peft_config, seed)
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    freeze_beyond_text(plain)
    for config in getattr(model, "peft_config", {}).values():
        base = config.base_model_name_or_path
        if base and os.path.isdir(base):  # the saved adapter opens in every working directory
            config.base_model_name_or_path = os.path.abspath(base)
    if plain is not model:
        backbone = set(plain.base_model.parameters())
        for module in plain.modules():
            own = set(module.parameters(recurse=False))
            is_trained = all(p.requires_grad and p.dtype != torch.float32 for p in own)
            if own and is_trained and not own & backbone:
                module.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model: none of its parameters requires a gradient, so nothing would "
                         "train; load an adapter with is_trainable=True")
    warn_of_half_precision(model)
    return model


def scale_learning_rate(rate, model):
    """Return rate x sqrt(1e5 / number of weights): larger models take smaller steps.

    An adapter takes ten times larger ones than all weights do (Hu et al. 2021, LoRA)."""
    rate *= math.sqrt(1e5 / sum(p.numel() for p in model.parameters()))
    rate *= 10 if hasattr(model, "peft_config") else 1
    print_once(f"learning rate {rate:.2g}, by the model's size; --learning-rate gives another")
    return rate


def use_few_threads(model):
    """Use one thread for a model below a million weights: splitting its products takes longer."""
    if sum(p.numel() for p in model.parameters()) < 10**6:
        torch.set_num_threads(1)


def warn_of_half_precision(model):
    """Warn if weights that are trained are in half precision."""
    kinds = {str(p.dtype)[6:] for p in model.parameters() if p.requires_grad} - {"float32"}
    for kind in kinds:
        warnings.warn(f"torch_dtype={kind}: weights of this type are trained, so steps below their "
                      "precision are lost; give float32, with --bf16 for speed", stacklevel=4)


# ----------------------------------------------------------------------------- output files
def writable_folder(path, fresh):
    """Create the output folder and check that it is writable. Raises InputError.

    A fresh run refuses a folder that holds the checkpoints of another run."""
    path = Path(path)
    with explain(f"output_dir {path} can't be written"):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    left = sorted(folder.name for folder in path.glob("checkpoint-*"))
    if fresh and left:
        raise InputError(f"output_dir {path} holds {left[-1]} of an earlier run: resume from it, "
                         "choose another --output-dir, or remove it")
    if fresh and os.environ.get("RANK", "0") == "0":
        (path / "samples.jsonl").unlink(missing_ok=True)  # runs append to it


def checkpoints(path):
    """List the checkpoint-<n> folders in the folder `path`, oldest first."""
    found = [folder for folder in Path(path).glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def newest_checkpoint(path, last_file=""):
    """Return `path` if it is a checkpoint-<n>, else the largest n in it. Raises InputError.

    last_file: the file that is written last, without which a checkpoint is incomplete."""
    path = Path(path)
    if path.name.startswith("checkpoint-") and path.is_dir():
        return path
    found = [folder for folder in checkpoints(path) if (folder / last_file).exists()]
    if not found:
        raise InputError(f"resume from {path}: no checkpoint-<n> there; give a checkpoint or the "
                         "output folder of a run")
    return found[-1]


def trainer_checkpoint(path):
    """Return the newest complete checkpoint of a Trainer's run. Raises InputError.

    Opens every file, so that a damaged checkpoint fails here and not in mid-training."""
    checkpoint = newest_checkpoint(path, "trainer_state.json")
    with explain(f"checkpoint {checkpoint} is damaged; resume from the one before"):
        json.loads((checkpoint / "trainer_state.json").read_text())
        parts = {"weights": ["*model*"], "optimizer": ["*optimizer*"],
                 "schedule": ["scheduler*", "custom_checkpoint*"]}  # Trainer's, accelerate's
        for part, names in parts.items():
            files = [file for name in names for file in checkpoint.glob(name)]
            if not files and not (checkpoint / "latest").exists():  # DeepSpeed has its own folders
                raise FileNotFoundError(f"it holds no {part}")
        for file in checkpoint.iterdir():
            if file.suffix == ".safetensors":
                safe_open(file, "pt").keys()
            elif file.name == "training_args.bin":
                continue
            elif file.suffix in (".pt", ".pth", ".bin", ".pkl"):
                zipfile.ZipFile(file).close()
    return str(checkpoint)


@contextmanager
def new_checkpoint(accelerator, folder, number, keep=None, best=None):
    """Yield a folder to write to, which becomes folder/checkpoint-<number>. Call on every rank.

    It is renamed when it is complete: a run that is killed meanwhile has the one before. Then the
    oldest are removed, except `keep` of them (None: all) and the one whose path is `best`."""
    final, aside = Path(folder, f"checkpoint-{number}"), Path(folder, "checkpoint.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    aside.mkdir(parents=True, exist_ok=True)
    yield aside
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        # never a newer one, which another run may have left here
        older = [path for path in checkpoints(folder) if int(path.name[11:]) < number]
        too_many = 0 if keep is None else max(len(older) + 1 - keep, 0)
        for old in older[:too_many]:
            if best is None or old.name != Path(best).name:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


class MetricsFile:
    """metrics.jsonl, one line per update. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path, current_step):
        lines = path.read_text().splitlines() if path.exists() and current_step else []
        complete = [line for line in lines if line.endswith("}")]
        kept = [line for line in complete if json.loads(line)["update"] <= current_step]
        aside = path.with_suffix(".tmp")  # a kill while this file is rewritten loses nothing
        aside.write_text("".join(line + "\n" for line in kept))
        aside.replace(path)
        self.path = path

    def write(self, row):
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def log_samples(folder, title, rows):
    """Print samples and append them to samples.jsonl. Call on one rank.

    rows: dicts of numbers (printed first) and texts (later lines indented), such as {"update": 0,
    "query": "the plot was", "response": " bland.", "score": -2.9}."""
    tqdm.write(f"\n{title}")
    with Path(folder, "samples.jsonl").open("a") as file:
        for row in rows:
            numbers = [f"{value:+6.2f}  " for value in row.values() if isinstance(value, float)]
            texts = [value for value in row.values() if isinstance(value, str)]
            tqdm.write("  " + "".join(numbers) + " |".join(texts).replace("\n", "\n      "))
            file.write(json.dumps(row) + "\n")


def write_model_card(folder, what, config, data, metrics):
    """Write README.md of a trained model: what it is, its sources, its last metrics.

    Call on one rank."""
    sources = {"model": config.model_name or "toy", **data}
    sources = ", ".join(f"{kind} `{name}`" for kind, name in sources.items())
    timing = ("runtime", "per_second", "step")
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items()
                      if isinstance(value, (int, float)) and not name.endswith(timing))
    Path(folder, "README.md").write_text(f"""---
library_name: transformers
---
# {Path(folder).resolve().name}

{what}, from {sources}.

| | at the end |
|---|---|
{table}
""")


# ----------------------------------------------------------------------------- files on Trainer
@dataclass
class TrainerFlags:
    """List the fields that the four configs on TrainingArguments share."""

    dataset_split: Optional[str] = None
    """Split to train on, such as train_sft. None: train, or the only one."""
    dataset_config: Optional[str] = None
    """Configuration of a dataset that has several, such as main of gsm8k."""
    eval_dataset_split: Optional[str] = None
    """Split to evaluate on, of eval_dataset or else of dataset. None: test or validation."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time."""
    save_total_limit: Optional[int] = 1
    """Number of checkpoints to keep. None: all."""

    def __post_init__(self):
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer computes in bfloat16 on a CPU only if told so
        # the name in transformers 5; Trainer warns about the old one
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()


def start_run(config):
    """Check the output folder and the checkpoint to resume from, and seed all random numbers.

    Returns the folder, and the checkpoint or None. Raises InputError."""
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = trainer_checkpoint(config.resume_from_checkpoint)
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
        is_over = state["epoch"] >= config.num_train_epochs
        if config.max_steps > 0:
            is_over = state["global_step"] >= config.max_steps
        # the model card is written last; Trainer would take an update too many
        if is_over and Path(config.output_dir, "README.md").exists():
            raise InputError(f"resume_from_checkpoint={checkpoint}: its run has ended; raise "
                             "--num-train-epochs or --max-steps to continue")
    writable_folder(config.output_dir, fresh=not checkpoint)
    set_seed(config.seed)  # a fresh head or adapter is the same on all ranks
    return Path(config.output_dir), checkpoint


def load_train_and_eval_rows(config, toy_rows, toy_eval_rows):
    """Load the rows of config.dataset, and the evaluation's, or None. Raises InputError.

    Without config.dataset: the files of the toy."""
    dataset = config.dataset or TOY / toy_rows
    rows = load_rows(dataset, config.dataset_split, config.dataset_config)
    held_out = load_eval_rows(config, dataset)
    if held_out is None and not config.dataset:
        held_out = load_rows(TOY / toy_eval_rows)
    return rows, held_out


def load_eval_rows(config, dataset):
    """Load the rows to evaluate on, or return None.

    They are a split of config.eval_dataset or, if config.eval_dataset_split is given, of `dataset`,
    which is trained on. Raises InputError if that would silently be the split of the training."""
    split = config.eval_dataset_split
    name = config.eval_dataset or (split and dataset)
    if not name:
        return None
    is_same = str(name) == str(dataset)
    settings = config.dataset_config if is_same else None
    if is_same and split is None and not Path(name).is_file():
        splits = load_splits(name, settings)
        if len(splits) == 1:
            raise InputError(f"eval_dataset={name}: it is the dataset too, which has the split "
                             f"{', '.join(splits)} alone; give other rows, or leave it out")
    return load_rows(name, split, settings, ("test", "validation"), "eval_dataset_split")


def map_sets(function, datasets, *args):
    """Apply a function to a dataset, or to each of a dict of datasets."""
    if isinstance(datasets, dict):
        return {name: function(dataset, *args) for name, dataset in datasets.items()}
    return function(datasets, *args)


def read_stream(rows):
    """Read a stream into a list; anything else stays as it is.

    Ranks fill the last batch of a stream with rows that they have had, and can't tell them apart
    in evaluation."""
    from datasets import IterableDataset
    is_stream = isinstance(rows, (IterableDataset, torch.utils.data.IterableDataset))
    return list(rows) if is_stream else rows


class TokenMeanEvaluation:
    """Make eval_loss the mean over all tokens of all ranks, not over batches (a Trainer's mixin).

    `compute_loss` calls add_to_evaluation when the model is in eval mode."""

    eval_sums = torch.zeros(2)  # of the losses, and their number

    def add_to_evaluation(self, nll, loss_mask):
        """Add losses [N] under loss_mask [B, T] to the evaluation's sums, over all ranks.

        Ranks repeat rows to fill the last batch: gather_for_metrics drops them, row by row."""
        row_of_token = loss_mask.nonzero()[:, 0]
        row_sums = nll.new_zeros(len(loss_mask)).index_add(0, row_of_token, nll.detach())
        row_counts = loss_mask.sum(1).to(row_sums)
        sums_and_counts = torch.stack([row_sums, row_counts], dim=1)                    # [B, 2]
        sums = self.accelerator.gather_for_metrics(sums_and_counts).sum(0)
        self.eval_sums = self.eval_sums.to(sums.device) + sums

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Run one evaluation step; all logits are computed only if metrics need them."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Run Trainer's loop, and replace its loss."""
        self.eval_sums = torch.zeros(2)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.eval_sums.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output


class Journal(TrainerCallback):
    """Write a Trainer's metrics to metrics.jsonl and show a progress bar, on the main rank.

    Each line is {"update": optimizer steps so far, "loss": ..., ...}.
    phases: what the bar says between and within epochs, such as ("sampling", "learning")."""

    def __init__(self, folder, phases=("", "")):
        self.path, self.file = Path(folder) / "metrics.jsonl", None
        self.phases = phases

    def on_train_begin(self, args, state, control, **kwargs):
        main = state.is_world_process_zero
        self.file = MetricsFile(self.path, state.global_step) if main else None
        if main and state.global_step:  # samples too, since they will be drawn again
            MetricsFile(self.path.with_name("samples.jsonl"), state.global_step)
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="update",
                        desc=self.phases[0] or None, disable=not main or args.disable_tqdm)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.bar.set_description(self.phases[1])

    def on_epoch_end(self, args, state, control, **kwargs):
        self.bar.set_description(self.phases[0])

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= state.max_steps:  # a run shorter than logging_steps has a loss too
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.file:
            self.file.write({"update": state.global_step, **logs})
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        timing = ("runtime", "per_second", "epoch")
        shown = [f"{name} {value:.4g}" for name, value in metrics.items()
                 if not name.endswith(timing)]
        if state.is_world_process_zero:
            tqdm.write(f"epoch {state.epoch or 0:.2f}: {', '.join(shown)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def last_evaluation(trainer):
    """Return the final evaluation's metrics; evaluate again if the best model was loaded since."""
    last = trainer.state.log_history[-2:][0]  # before train()'s own line
    is_current = "eval_loss" in last and not trainer.args.load_best_model_at_end
    return last if is_current else trainer.evaluate()


# ----------------------------------------------------------------------------- retired arguments
# Fields that transformers 5 has renamed: type, default, and today's field, "field.key" of a dict
# field, or {field: value}.
RENAMED = {
    "evaluation_strategy": (str, "no", "eval_strategy"),
    "per_gpu_train_batch_size": (Optional[int], None, "per_device_train_batch_size"),
    "per_gpu_eval_batch_size": (Optional[int], None, "per_device_eval_batch_size"),
    "warmup_ratio": (float, 0.0, "warmup_steps"),  # below 1 it is a fraction of all steps
    "no_cuda": (bool, False, "use_cpu"),
    "tpu_metrics_debug": (bool, False, {"debug": "tpu_metrics_debug"}),
    "fsdp_min_num_params": (int, 0, "fsdp_config.min_num_params"),
    "fsdp_transformer_layer_cls_to_wrap": (
        Optional[str], None, "fsdp_config.transformer_layer_cls_to_wrap"),
    "adafactor": (bool, False, {"optim": "adafactor"}),
    "group_by_length": (bool, False, {"train_sampling_strategy": "group_by_length"}),
    "include_inputs_for_metrics": (bool, False, {"include_for_metrics": ["inputs"]}),
    "push_to_hub_model_id": (Optional[str], None, "hub_model_id"),
    "push_to_hub_token": (Optional[str], None, "hub_token"),
    "torchdynamo": (Optional[str], None, "torch_compile_backend"),  # which sets torch_compile
    "dispatch_batches": (Optional[bool], None, "accelerator_config.dispatch_batches"),
    "split_batches": (bool, False, "accelerator_config.split_batches"),
    "include_tokens_per_second": (bool, False, {"include_num_input_tokens_seen": "all"}),
}
# Fields that transformers 5 has removed: type, default, and what to do instead.
REMOVED = {
    "overwrite_output_dir": (bool, False, "files are always overwritten; empty the folder instead"),
    "logging_dir": (Optional[str], None, "set the environment variable TENSORBOARD_LOGGING_DIR"),
    "save_safetensors": (bool, True, "for the old format call torch.save(model.state_dict(), ...)"),
    "use_mps_device": (bool, False, "Apple's GPU is the default; use_cpu turns it off"),
    "jit_mode_eval": (bool, False, "use torch_compile"),
    "use_ipex": (bool, False, "use bf16 or torch_compile"),
    "fp16_opt_level": (str, "O1", "use fp16 or bf16, which do what O1 did"),
    "half_precision_backend": (str, "auto", "use fp16 or bf16"),
    "tpu_num_cores": (Optional[int], None, "give the number of cores to torch_xla's launcher"),
    "past_index": (int, -1, "leave it out"),
    "use_legacy_prediction_loop": (bool, False, "leave it out"),
    "fp16_backend": (str, "auto", "use fp16 or bf16"),
    "push_to_hub_organization": (Optional[str], None, "use hub_model_id='organization/name'"),
    "mp_parameters": (str, "", "use fsdp or deepspeed"),
    "ray_scope": (str, "last", "set the environment variable RAY_SCOPE"),
}
RETIRED = {**RENAMED, **REMOVED}
RetiredArguments = make_dataclass("RetiredArguments", [
    (name, Annotated[kind, tyro.conf.Suppress], field(default=default))
    for name, (kind, default, _) in RETIRED.items()])


def replace_retired(config):
    """Set today's fields of TrainingArguments from retired ones. Raises InputError.

    It raises if transformers 5 has nothing like the retired field, or if both are given and differ.
    """
    for name, (_, default, today) in RETIRED.items():
        value = getattr(config, name)
        if value == default:
            continue
        if name in REMOVED:
            raise InputError(f"{name}={value!r}: transformers 5 has removed it; {today}")
        if isinstance(today, dict):
            today, value = next(iter(today.items()))
        today, _, key = today.partition(".")
        current = getattr(config, today)
        if key and isinstance(current, str):
            raise InputError(f"{name}={value!r}: {today}={current!r} is a file; set {key} in it")
        if key:
            value = {**(current or {}), key: value}
        elif isinstance(current, (str, bool, int, float)):
            if current not in (value, type(config).__dataclass_fields__[today].default):
                raise InputError(f"{name}: it means {today}={value!r}, and {today}={current!r} is "
                                 f"given; give {today} alone")
        setattr(config, today, value)


# ----------------------------------------------------------------------------- ppo.py and ddpo.py
class LoopTrainer:
    """Ranks, trackers and checkpoints of a trainer that owns its loop (PPOTrainer, DDPOTrainer).

    A subclass has a `config` and an `optimizer`, and defines `state_dict` and `load_state_dict`
    for what a checkpoint holds besides weights, optimizer and random numbers."""

    keep_checkpoints = 1
    lr_scheduler = None

    def start_accelerator(self, project, **settings):
        """Make the accelerator from `project`, arguments of ProjectConfiguration, and settings.

        The config's project_kwargs and accelerator_kwargs override them. Raises InputError."""
        config = self.config
        check_arguments("project_kwargs", config.project_kwargs, ProjectConfiguration)
        check_arguments("accelerator_kwargs", config.accelerator_kwargs, Accelerator)
        project = ProjectConfiguration(**{**project, **config.project_kwargs})
        project.automatic_checkpoint_naming = False  # save_checkpoint names them
        settings = {"log_with": config.log_with, "project_config": project, **settings}
        self.accelerator = Accelerator(**{**settings, **config.accelerator_kwargs})
        if self.accelerator.gradient_accumulation_steps != 1:
            raise InputError("gradient_accumulation_steps (accelerator_kwargs or accelerate's "
                             "configuration): leave it out; set the config's own field")

    def sum_over_ranks(self, tensor):
        """Sum a tensor over all ranks."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor, "sum")

    def start_trackers(self, run_name=None):
        """Start the tracker `log_with` with the config's plain values. run_name: for wandb."""
        config = self.config
        tracker_kwargs = dict(config.tracker_kwargs)
        if config.log_with == "wandb" and run_name:
            tracker_kwargs["wandb"] = {"name": run_name, **tracker_kwargs.get("wandb", {})}
        if config.log_with:
            plain = {name: value for name, value in config.to_dict().items()
                     if isinstance(value, (int, float, str, bool))}
            self.accelerator.init_trackers(config.tracker_project_name, plain, tracker_kwargs)

    def log_table_and_histograms(self, vectors, columns, table):
        """Send vectors {name: tensor [n]} and a table of samples to the tracker (main rank)."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "wandb":
                import wandb
                # a ratio may overflow, and a histogram's bins can be too narrow for float32
                histograms = {name: wandb.Histogram(x[x.isfinite()].double().cpu().numpy())
                              for name, x in vectors.items()}
                tracker.log(histograms, step=self.current_step)
                tracker.log_table("game_log", columns, table, step=self.current_step)
            else:
                for name, vector in vectors.items():
                    tracker.writer.add_histogram(name, vector.float().cpu(), self.current_step)
                rows = [" | ".join([f"{reward:.2f}", *map(str, row)]) for *row, reward in table]
                tracker.writer.add_text("game_log", "\n\n".join(rows), self.current_step)

    def save_checkpoint(self, folder, number):
        """Write folder/checkpoint-<number> and remove the oldest ones. Call on every rank."""
        with new_checkpoint(self.accelerator, folder, number, self.keep_checkpoints) as aside:
            self.accelerator.save_state(str(aside), safe_serialization=False)

    def load_checkpoint(self, path):
        """Restore weights, optimizer, random state and `state_dict` of a checkpoint.

        The learning rate stays the config's, unless a scheduler sets it."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        with explain(f"checkpoint {path} is damaged; resume from another"):
            # accelerate goes on without the random numbers that it can't read
            rank = self.accelerator.process_index
            zipfile.ZipFile(Path(path, f"random_states_{rank}.pkl")).close()
            self.accelerator.load_state(str(path))
        if self.lr_scheduler is None:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
