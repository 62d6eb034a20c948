"""Collect what the six algorithms share. No update is here: each is in its algorithm's file.

    InputError, explain, load_function       one-sentence errors; a function from a user's file
    set_seed                                 one seed for Python, NumPy and torch
    logprobs_from_logits, masked_mean, ...   log-probabilities, statistics over unmasked tokens
    only_logits_of, disable_dropout, ...     forward passes without waste and without noise
    load_pretrained, with_adapter            a model, or base model and adapter
    AutoModelForCausalLMWithValueHead        a language model with a value head (also: Seq2Seq)
    create_reference_model, copy_adapter     the policy that training starts from, frozen

chats.py goes from a prompt to a response to its reward; machinery.py holds what the command lines
share. Nothing happens at import: no network, no CUDA, no seed.
"""
import copy
import importlib.util
import os
import random
import sys
import tempfile
import traceback
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
)

TOY = Path(__file__).resolve().parent / "toy"
VALUE_HEAD_FILE = "value_head.safetensors"


class InputError(ValueError):
    """A wrong input of the user, in one sentence. `run` prints it without a traceback."""


@contextmanager
def explain(what, place=""):
    """Raise any error inside again as an InputError: what failed, why, and in which line.

    An InputError inside keeps its message; `place`, where in the data it is, goes in front."""
    try:
        yield
    except InputError as error:
        if place:
            raise InputError(f"{place}: {error}") from error
        raise
    except (Exception, CheckpointException) as error:  # torch derives its own from BaseException
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"{type(error).__name__}, {Path(frame.filename).name}:{frame.lineno}"
        raise InputError(f"{what}: {reason} ({where})") from error


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


# ----------------------------------------------------------------------------- seeds and ranks
def set_seed(seed: int):
    """Seed `random`, `numpy.random` and `torch` on the calling rank, all with the same number.

    Raises InputError for a number that NumPy does not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: give a number from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def unsharded(*models):
    """Gather the weights that FSDP 2 has sharded, once, for many forward passes.

    Call on every rank. Ranks may then call the models unequally often, as they do in sampling.
    A model that is None is left out."""
    modules = [module for model in models if model is not None for module in model.modules()]
    shards = [module for module in modules if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@contextmanager
def tied_weights_once(model):
    """Let `model.state_dict()` hold a tied weight under its first name only.

    Gathered from shards, its two names would be two tensors, and a file would hold both."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    copies = names - {name for name, _ in model.named_parameters()}

    def remove(module, state_dict, prefix, local_metadata):
        for name in copies:
            state_dict.pop(prefix + name, None)

    hook = model.register_state_dict_post_hook(remove)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def only_what_trains(model):
    """Keep frozen weights out of `model.state_dict()`; `load_state_dict` then leaves them alone.

    For checkpoints: LoRA's base is as it was loaded."""
    def drop(module, state_dict, prefix, local_metadata):
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                del state_dict[prefix + name]

    def fill_in(module, state_dict, prefix, *args):
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                state_dict[prefix + name] = weight

    hooks = []
    for module in model.modules():
        hooks += [module.register_state_dict_post_hook(drop),
                  module.register_load_state_dict_pre_hook(fill_in)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------- log-probabilities
def logprobs_from_logits(logits, labels, gather=True):
    """Compute log p(label) [...] in float32 from logits [..., V] and labels [...].

    gather=False: the whole log-softmax [..., V]."""
    if not gather:
        return F.log_softmax(logits.float(), dim=-1)
    nll = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
    return -nll.view(labels.shape)


def entropy_from_logits(logits):
    """Compute the entropy [...] (nats) in float32 of the distributions with logits [..., V]."""
    logits = logits.float()
    # H = log sum exp(z) - sum p z with p = softmax(z): one temporary of the logits' size
    return logits.logsumexp(-1) - torch.linalg.vecdot(logits.softmax(-1), logits)


def masked_mean(values, mask, axis=None):
    """Average the values where the mask is 1, over all dimensions or over `axis`."""
    return (values * mask).sum(axis) / mask.sum(axis)


def masked_var(values, mask, unbiased=True):
    """Compute the variance of the values under the mask; unbiased if there are two or more."""
    n = mask.sum()
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * n / (n - 1) if unbiased and n > 1 else variance


def masked_whiten(values, mask, shift_mean=True, sum_over_ranks=lambda x: x):
    """Scale the values under the mask to variance 1 and mean 0. shift_mean=False: keep their mean.

    Masked values change too: multiply by the mask afterwards. Fewer than two values are returned as
    they are. sum_over_ranks: adds a tensor up over all ranks; the default is for one rank."""
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
    """Raise InputError if the loss is not finite. done, of: such as 12 and "PPO updates"."""
    if not torch.isfinite(loss):
        raise InputError(f"the loss is {loss.item()} after {done} {of}: look at the data, or "
                         "give a lower learning rate")


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
    """Make the model return only the logits [N, V] of the N tokens under select [B, T] (bool).

    Logits of prompts and padding would fill most of the memory when V is 100,000, and take a third
    of the time of a PPO step. The hidden states are selected just before the output layer, so any
    change that the model makes to its logits (scaling, soft-capping) still applies.
    model: plain, wrapped by accelerate, or with a value head."""
    model = getattr(model, "module", model)
    model = getattr(model, "pretrained_model", model)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Embedding):  # FSMT gives its input embeddings
        head = model.get_decoder().output_projection

    def select_tokens(_, args):
        hidden_states = args[0].movedim(-2, 1)  # [B, T, ...]; ProphetNet's are [B, streams, T, D]
        # prompt tuning puts virtual tokens before the T of the text
        return (hidden_states[:, -select.shape[1]:][select],)

    hook = head.register_forward_pre_hook(select_tokens)
    try:
        yield
    finally:
        hook.remove()


JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def disable_dropout(model):
    """Set all dropout to 0 for good: equal weights then give equal log-probabilities.

    Train mode stays, since gradient checkpointing needs it. Some models keep the probability as a
    number of their own (dropout, layerdrop, drop_prob), or read it from their config (Falcon).
    Routers of experts multiply their inputs by random numbers: this is turned off, too."""
    copies = {}  # layers get a copy of their config, so that the saved one keeps its dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        holders = [module]
        for key, config in list(vars(module).items()):
            if isinstance(config, PreTrainedConfig) and not hasattr(module, "save_pretrained"):
                if id(config) not in copies:
                    copies[id(config)] = copy.deepcopy(config)
                holders.append(copies[id(config)])
                setattr(module, key, holders[-1])
        for holder in holders:
            for name, value in vars(holder).items():
                is_noise = "drop" in name or name in JITTER
                if is_noise and isinstance(value, float):
                    setattr(holder, name, 0.0)


def warn_of_noise(differences, logprobs, allowed):
    """Warn if log-probabilities that one set of weights gave twice differ by too much.

    allowed: the largest fraction, mean |difference| / mean |log-probability|."""
    noise = (differences.abs().mean() / logprobs.abs().mean()).item()
    if noise > allowed:
        warnings.warn(f"before the first optimizer step log-probabilities differ by {noise:.1%}: "
                      "in train mode this model draws random numbers (dropout, or "
                      "experts chosen at random), so losses and ratios are noisy", stacklevel=3)


def number_of_positions(model):
    """Return how many tokens a row of this model can have; 10**9 if it has no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    for name, module in model.named_modules():
        is_table = name.endswith("position_embeddings")
        if is_table and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa's first position comes after this one
    return positions


# ----------------------------------------------------------------------------- models and adapters
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def hub_arguments(kwargs, *others):
    """Select, from arguments of from_pretrained, those that find a file on the hub, and others."""
    return {name: kwargs[name] for name in (*HUB_ARGUMENTS, *others) if name in kwargs}


def load_pretrained(auto_class, name, is_trainable, *args, **kwargs):
    """Load a plain model, or base model and adapter if `name` is an adapter.

    A checkpoint in half precision becomes float32, unless a dtype is given: half precision is too
    coarse to train in. load_in_8bit and load_in_4bit mean what they meant in transformers 4."""
    bits = {key: kwargs.pop(key) for key in ("load_in_8bit", "load_in_4bit") if key in kwargs}
    if any(bits.values()):
        kwargs["quantization_config"] = BitsAndBytesConfig(**bits)
    if not {"dtype", "torch_dtype", "quantization_config"} & set(kwargs):
        kwargs["dtype"] = torch.float32
    base, base_kwargs = base_of(name, **kwargs)
    model = auto_class.from_pretrained(base, *args, **base_kwargs)
    if base == name:
        return model
    from peft import PeftModel
    return PeftModel.from_pretrained(
        model, name, is_trainable=is_trainable, **hub_arguments(kwargs))


def base_of(name, **kwargs):
    """Return the name of an adapter's base model, and the arguments to load it.

    A model that is no adapter is its own base."""
    from transformers.utils import find_adapter_config_file
    hub = hub_arguments(kwargs)
    if find_adapter_config_file(name, **hub) is None:
        return name, kwargs
    from peft import PeftConfig
    config = PeftConfig.from_pretrained(name, **hub)
    return config.base_model_name_or_path, {**kwargs, "revision": config.revision}


def with_adapter(model, peft_config, seed=None):
    """Put a fresh adapter on the model. Raises InputError.

    seed: set before its weights are drawn, so that equal seeds draw equal ones."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    if hasattr(model, "peft_config"):
        raise InputError("peft_config: the model has an adapter already; give one or the other")
    if getattr(model, "is_quantized", False):  # gradient checkpointing has a switch of its own
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    beyond_text = freeze_beyond_text(model)
    if beyond_text and hasattr(peft_config, "exclude_modules"):
        peft_config = copy.copy(peft_config)
        peft_config.exclude_modules = peft_config.exclude_modules or beyond_text
    if seed is not None:
        set_seed(seed)
    return get_peft_model(model, peft_config)


def freeze_beyond_text(model):
    """Freeze the modules that text does not reach, such as a vision tower. Returns their names.

    On several ranks DDP would wait for its gradients."""
    config, text = model.config, model.config.get_text_config()
    if config.is_encoder_decoder or text is config:
        return []
    backbone, decoder = model.base_model, model.get_decoder()
    for parameter in set(backbone.parameters()) - set(decoder.parameters()):
        parameter.requires_grad_(False)
    unread = set(backbone.modules()) - set(decoder.modules())
    return [name for name, module in model.named_modules() if module in unread]


# ----------------------------------------------------------------------------- value heads
class ValueHead(nn.Module):
    """Map hidden states [..., D] to values V(s_t) [..., 1] in float32, one per token.

    All values start at 0 (as in OpenAI's code): the first advantages come from rewards alone."""

    def __init__(self, config, summary_dropout_prob=None, hidden_size=None):
        super().__init__()
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", None) or 0.0
        self.dropout = nn.Dropout(summary_dropout_prob)
        self.summary = nn.Linear(hidden_size or config.hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states):
        hidden_states = self.dropout(hidden_states.float())
        weight, bias = self.summary.weight.float(), self.summary.bias.float()  # FSDP casts them
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states, weight, bias)


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
                        is_trainable=False, reward_adapter=None, reward_adapter_name="reward",
                        summary_dropout_prob=None, v_head_init_strategy=None,
                        v_head_initializer_range=0.2, require_v_head=None, **kwargs):
        """Load a model with its value head, or put a new head on a model. Raises ValueError.

        pretrained_model_name_or_path: a model object, a hub name or a folder (a plain model, one
            saved by `save_pretrained` here or by TRL 0.7, sharded or not, or a PEFT adapter).
        peft_config: put a fresh adapter on the model. is_trainable: train a loaded adapter further.
        reward_adapter: a sequence classifier's LoRA adapter, for `compute_reward_score`.
        v_head_init_strategy: "normal": a new head draws its weights with standard deviation
            v_head_initializer_range; None: it starts at zero.
        require_v_head: True: raise if no head was saved; None: warn; False: expect a new head.
        All other arguments go to the transformers class."""
        model, head = pretrained_model_name_or_path, None
        hub = hub_arguments(kwargs)
        if isinstance(model, (str, Path)):
            name, auto_class = str(model), cls.transformers_parent_class
            model = load_pretrained(auto_class, name, is_trainable, *args, **kwargs)
            head = read_value_head(name, **hub)
            if head is None and require_v_head is not False:
                missing = f"{name} holds no value head: it gets a new one"
                if require_v_head:
                    raise ValueError(missing)
                warnings.warn(missing, stacklevel=2)
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        wrapped = cls(model, summary_dropout_prob)
        if v_head_init_strategy == "normal":
            nn.init.normal_(wrapped.v_head.summary.weight, std=v_head_initializer_range)
        if head is not None:
            wrapped.v_head.load_state_dict(head)
        if reward_adapter is not None:
            hub.pop("revision", None)  # it is the model's
            wrapped._add_reward_adapter(str(reward_adapter), reward_adapter_name, **hub)
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

    def get_input_embeddings(self):
        return self.pretrained_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.pretrained_model.get_output_embeddings()

    def tie_weights(self):
        """Tie the embeddings again, after FSDP has moved the weights."""
        self.pretrained_model.tie_weights()

    def generate(self, *args, **kwargs):
        """Call the language model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """Recompute activations in the backward pass; non-reentrant, as frozen embeddings need."""
        kwargs = gradient_checkpointing_kwargs or {"use_reentrant": False}
        self.pretrained_model.gradient_checkpointing_enable(kwargs)

    def gradient_checkpointing_disable(self):
        """Keep activations for the backward pass again."""
        self.pretrained_model.gradient_checkpointing_disable()

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
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return upload(folder, repo_id, commit_message, private=private, token=token)

    def _add_reward_adapter(self, folder, name, **hub):
        if not self.is_peft_model:
            raise ValueError("reward_adapter needs a policy with an adapter of its own "
                             "(peft_config): both share one base model")
        from peft.utils import load_peft_weights
        policy_name = self.pretrained_model.active_adapter
        self.rm_adapter_name = name
        self.pretrained_model.load_adapter(folder, adapter_name=name, is_trainable=False, **hub)
        self.pretrained_model.set_adapter(policy_name)
        weights = load_peft_weights(folder, device="cpu", **hub)
        weights = [v for k, v in weights.items() if k.endswith("score.weight")]
        if not weights:
            raise ValueError(f"reward_adapter {folder}: no weights of a score layer; train it as a "
                             "sequence classifier")
        self.score = nn.Linear(weights[0].shape[1], weights[0].shape[0], bias=False)
        self.score.load_state_dict({"weight": weights[0]})
        self.score.to(self.v_head.summary.weight.device).requires_grad_(False)

    @torch.no_grad()
    def compute_reward_score(self, input_ids, attention_mask=None, **kwargs):
        """Compute the reward adapter's scores at every token [B, T, labels].

        The score of a row is the one at its last token that is not padding."""
        with active_adapter(self.pretrained_model, self.rm_adapter_name):
            output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask,
                                           use_cache=False, output_hidden_states=True, **kwargs)
        return self.score(output.hidden_states[-1].to(self.score.weight.dtype))


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder-only language model (GPT-2, Llama, Qwen, ...) with a value head."""
    transformers_parent_class = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model (T5, BART, ...) with a value head on the decoder."""
    transformers_parent_class = AutoModelForSeq2SeqLM


def upload(folder, repo_id, commit_message, private=None, token=None, **kwargs):
    """Upload a folder to the hub's repository `repo_id`, which is created if need be."""
    from huggingface_hub import HfApi
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message,
                             **kwargs)


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
    # OPT lists the norm after its layers before them: it is not below the cut
    last = pattern.partition("layers.{layer}")[0] + "final_layer_norm."
    shared = [p for name, p in parameters[:cut] if last not in name]
    # deepcopy takes what its memo holds as copied already: these parameters stay the very same
    return copy.deepcopy(model, {id(p): p for p in shared}).requires_grad_(False).eval()


def copy_adapter(model, name="reference"):
    """Put a frozen copy of a PeftModel's active adapter next to it, under this name."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    policy_name = model.active_adapter
    config = copy.copy(model.peft_config[policy_name])
    config.inference_mode = True
    config.init_lora_weights = True  # PiSSA, OLoRA: they would change the base weights once more
    if getattr(config, "bias", "none") != "none":
        raise InputError(f"bias={config.bias!r} (peft_config): it trains weights that policy and "
                         "reference share; set bias='none', or give a ref_model")
    with explain("peft_config: the adapter can't be copied as the reference; give a ref_model"):
        model.add_adapter(name, config)
    weights = get_peft_model_state_dict(model, adapter_name=policy_name)
    set_peft_model_state_dict(model, weights, adapter_name=name)  # copies the values
    model.set_adapter(policy_name)
    for key, parameter in model.named_parameters():  # set_adapter skips prompt tuning's tokens
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
