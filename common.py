"""What the six trainers share and what is no algorithm: seeds, ranks, rows of a dataset, and models with a value head.

    set_seed(seed)                                   one seed for Python, NumPy and torch
    setup_ranks()                                    torchrun's processes become one group, on GPUs (nccl) or CPUs (gloo)
    run(main, Config)                                the command line of a script: flags in, one clear sentence out
    load_rows, load_prompts, load_reward             a local file, a folder or a hub name -> rows, prompts, a reward function
    writable_folder, newest_checkpoint, MetricsFile, Journal  what a run leaves behind
    AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, create_reference_model

Nothing happens at import: no network, no CUDA, no seed.
"""
import copy
import ctypes
import json
import os
import random
import runpy
import sys
import tempfile
import traceback
import warnings
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification,
                          AutoTokenizer, TrainerCallback)

TOY = Path(__file__).resolve().parent / "toy"
VALUE_HEAD_FILE = "value_head.safetensors"
SLICE = 64  # rows of [N, V] worked on at a time, while they are in the cache


class InputError(ValueError):
    """The user's input is wrong: one sentence that says what, where, and what to do. `run` prints it without a traceback."""


# ------------------------------------------------------------------------------------------------ seeds, ranks, scripts
def set_seed(seed: int):
    """Seeds `random`, `numpy.random` and `torch` (every device) alike, on the calling rank. No rank offset: give each
    rank its own seed where it should draw its own samples."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def setup_ranks():
    """Call it before anything of accelerate or Trainer: torchrun's ranks then form one process group.

    Without a GPU both libraries would start WORLD_SIZE independent copies of the job; told to use the CPU, they form a
    gloo group. With GPUs they need no help; float32 matrix products may use TF32 there."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")
        return
    keep_freed_memory()
    if os.environ.get("WORLD_SIZE") == "1":  # one process needs no group, and Trainer warns of one
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
    elif "WORLD_SIZE" in os.environ:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def prepare_process(args):
    """For each trainer over transformers.Trainer, with its arguments: a GPU has a process of its own (Trainer would split batches
    among threads, which the algorithms here don't know), and CPUs keep freed memory. Raises InputError."""
    if args.n_gpu > 1:
        raise InputError(f"this one process sees {args.n_gpu} GPUs: start it with torchrun --nproc_per_node {args.n_gpu}, or show it one "
                         "with CUDA_VISIBLE_DEVICES=0")
    if not torch.cuda.is_available():
        keep_freed_memory()


def keep_freed_memory():
    """On CPUs, for this process: malloc keeps large blocks that were freed. By default glibc gives each back to the system,
    which clears it anew, page by page, for the next tensor: a fifth to a quarter of the time of a PPO step."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # glibc
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run(main, config_class):
    """The command line of a script: `main(config)` with the flags of `config_class`.

    An InputError ends the process with its one sentence and status 1; any other error keeps its traceback. torchrun
    stops the other ranks as soon as one has failed, so none waits for ever."""
    import datasets
    import transformers
    import tyro

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory")  # Trainer asks for it on CPUs too
    setup_ranks()  # first: a config of Trainer's looks for devices and ranks as soon as it is made
    flags = tyro.constructors.ConstructorRegistry()
    flags.primitive_rule(json_flag)
    config = tyro.cli(config_class, description=main.__doc__, registry=flags)
    try:
        main(config)
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def json_flag(field):
    """How tyro reads a field that takes a dict or a file's name, such as --fsdp-config: JSON where it begins with {."""
    from tyro.constructors import PrimitiveConstructorSpec
    if any(dict in (kind, get_origin(kind)) for kind in get_args(field.type)):
        return PrimitiveConstructorSpec(
            nargs=1, metavar="JSON|FILE", is_instance=lambda value: isinstance(value, (dict, str, type(None))),
            instance_from_str=lambda words: json.loads(words[0]) if words[0].startswith("{") else words[0],
            str_from_instance=lambda value: [json.dumps(value)])


@contextmanager
def explain(what):
    """Any error inside becomes one sentence: `what`, then the error's own first line and where it was raised."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}: {reason} ({type(error).__name__}, {Path(place.filename).name}:{place.lineno})") from error


def load_rows(name, split="train"):
    """Rows of a data set, the same for every script -> datasets.Dataset.

    name: a local .jsonl, .json, .csv, .parquet or .txt file (each line a row `text`), a folder written by
    `save_to_disk` (or any folder that `load_dataset` reads), or a name on the hub. Raises InputError."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    if path.is_file() and path.suffix not in kinds:
        raise InputError(f"data file {name}: unknown kind {path.suffix!r}; use one of {', '.join(kinds)}")
    if path.suffix in kinds and not path.exists():
        raise InputError(f"data file {name} does not exist here ({Path.cwd()})")
    with explain(f"data set {name} is neither a readable file or folder nor a data set on the hub"):
        if path.is_file():
            return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = load_from_disk(str(path))
            return rows[split] if isinstance(rows, DatasetDict) else rows
        return load_dataset(str(name), split=split)


def load_prompts(name, tokenizer, max_length=None, longest=None, keep_columns=False):
    """Prompts to answer -> a list of rows {"query": "the plot was", "input_ids": [17, 4, 301]}.

    name: a data set with a column query, prompt, messages (chat, through the tokenizer's template; a last answer of the
    assistant is left off), text or input_ids. max_length: queries are cut to their first tokens, so many. longest: a query
    of more tokens than this leaves no room for an answer. keep_columns: rows keep their other columns. Raises InputError."""
    rows = load_rows(name)
    known = ("query", "prompt", "messages", "text", "input_ids")
    column = next((c for c in known if c in rows.column_names), None)
    if column is None:
        raise InputError(f"data set {name} has the columns {rows.column_names} and none of {', '.join(known)}: rename the one "
                         "that holds the prompts")

    def tokenize(number, value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[:-1] if value[-1]["role"] == "assistant" else value
            ids = tokenizer.apply_chat_template(value, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(value, verbose=False).input_ids if isinstance(value, str) else list(value or [])
        ids = ids[:max_length]
        if not ids:
            raise InputError(f"data set {name}, row {number}: {column} is empty; remove the row")
        if longest is not None and len(ids) > longest:
            raise InputError(f"data set {name}, row {number}: {len(ids)} tokens, and with the answer's the model takes {longest}; "
                             "set --max-query-length, or fewer --max-new-tokens")
        return {"query": tokenizer.decode(ids), "input_ids": ids}

    with explain(f"data set {name}: column {column} can't be tokenised"):
        return [{**(row if keep_columns else {}), **tokenize(number, row[column])} for number, row in enumerate(rows)]


def load_reward(name, label=None, device="cpu"):
    """-> function: a list of texts -> a list of scalar tensors, one score for each. Raises InputError.

    name: `file.py:function` (texts -> numbers), or a sequence classifier's folder or hub name, whose score is the logit of
    its only label, or of `label` (name or number)."""
    file, _, function = str(name).rpartition(":")
    if file.endswith(".py"):
        with explain(f"reward_model {name} can't be loaded"):
            score = runpy.run_path(file)[function]
    else:
        score = _classifier(name, label, device)

    def checked(texts):
        with explain(f"reward_model {name} failed on {len(texts)} texts, the first of them {texts[0]!r}"):
            scores = [torch.tensor(float(number)) for number in score(texts)]
        if len(scores) != len(texts):
            raise InputError(f"reward_model {name} returned {len(scores)} scores for {len(texts)} texts: return one for each")
        return scores

    return checked


def _classifier(name, label, device):
    with explain(f"reward_model {name} is neither file.py:function nor a sequence classifier's folder or hub name"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name).to(device).eval()
    names = {str(label_name): i for i, label_name in model.config.id2label.items()}
    labels = {**{str(i): i for i in range(model.config.num_labels)}, **names}
    if model.config.num_labels > 1 and label is None:
        raise InputError(f"reward_model {name} has {model.config.num_labels} labels: choose the one whose logit is the score "
                         f"with --reward-label, one of {', '.join(names)}")
    if label is not None and label not in labels:
        raise InputError(f"reward_label {label!r} is none of {', '.join(names)}")
    column = 0 if label is None else labels[label]
    tokenizer.pad_token, tokenizer.truncation_side = tokenizer.pad_token or tokenizer.eos_token, "left"  # the answer is at the end
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)

    @torch.no_grad()
    def score(texts):
        scores = []
        for i in range(0, len(texts), 64):
            # on the right: a classifier that makes no positions from the mask (GPT-2) reads left-padded text shifted
            inputs = tokenizer(texts[i:i + 64], padding=True, padding_side="right", truncation=True, max_length=longest,
                               return_tensors="pt")
            scores += model(**inputs.to(device)).logits[:, column].float().tolist()
        return scores

    return score


# ------------------------------------------------------------------------------------------------ what a run leaves behind
def writable_folder(path, fresh):
    """Makes the folder and writes to it, to learn at once whether a week's work could be kept. Raises InputError, also where a
    fresh run would overwrite the checkpoints of another."""
    with explain(f"output_dir {path} can't be written"):
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    left = sorted(folder.name for folder in Path(path).glob("checkpoint-*"))
    if fresh and left:
        raise InputError(f"output_dir {path} holds {left[-1]} of an earlier run: resume from it, or choose another --output-dir, or "
                         "remove it")
    if fresh and os.environ.get("RANK", "0") == "0":
        Path(path, "samples.jsonl").unlink(missing_ok=True)  # runs append to it


def newest_checkpoint(path, last_file=""):
    """A folder checkpoint-<n>, or the one of the largest n in the folder of a run. last_file: what is written last, without
    which a checkpoint is none. Raises InputError."""
    path = Path(path)
    found = [path] if path.name.startswith("checkpoint-") and path.is_dir() else [
        folder for folder in path.glob("checkpoint-*") if (folder / last_file).exists()]
    if not found:
        raise InputError(f"resume from {path}: no checkpoint-<n> there; give a checkpoint or the output folder of a run")
    return max(found, key=lambda folder: int(folder.name.split("-")[1]))


def trainer_checkpoint(path):
    """newest_checkpoint of a Trainer's run, passing over one that a kill cut short, once its files have been opened: what is
    damaged is better known before a run goes on from it. Raises InputError."""
    checkpoint = newest_checkpoint(path, "trainer_state.json")
    with explain(f"checkpoint {checkpoint} is damaged; resume from the one before"):
        json.loads((checkpoint / "trainer_state.json").read_text())
        if not any(checkpoint.glob("*model*")):
            raise FileNotFoundError("it holds no weights")
        for file in checkpoint.iterdir():
            if file.suffix == ".safetensors":
                safe_open(file, "pt").keys()
            elif file.suffix in (".pt", ".pth", ".bin") and file.name != "training_args.bin":
                zipfile.ZipFile(file).close()
    return str(checkpoint)


class MetricsFile:
    """metrics.jsonl, a line an update. A run that is resumed drops what was written after its checkpoint."""

    def __init__(self, path, current_step):
        lines = path.read_text().splitlines() if path.exists() and current_step else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["update"] <= current_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, row):
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Journal(TrainerCallback):
    """What a Trainer tells, on the main rank: metrics.jsonl, {"update": optimizer steps so far, "loss": ..., ...} a line, a
    progress bar, and a line for each evaluation. Trainer's own bar goes: `trainer.remove_callback(ProgressCallback)`."""

    def __init__(self, folder):
        self.path, self.file = Path(folder) / "metrics.jsonl", None

    def on_train_begin(self, args, state, control, **kwargs):
        main = state.is_world_process_zero
        self.file = MetricsFile(self.path, state.global_step) if main else None
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="update", disable=not main or args.disable_tqdm)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.file:
            self.file.write({"update": state.global_step, **logs})
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        timing = ("runtime", "per_second", "epoch")
        told = [f"{name} {value:.4g}" for name, value in metrics.items() if not name.endswith(timing)]
        if state.is_world_process_zero:
            tqdm.write(f"epoch {state.epoch or 0:.2f}: {', '.join(told)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def last_evaluation(trainer):
    """The metrics of the evaluation that ended the training, or of one that is made now: the weights may be other ones since."""
    last = trainer.state.log_history[-2:][0]  # before train()'s own line
    return last if "eval_loss" in last and not trainer.args.load_best_model_at_end else trainer.evaluate()


def write_model_card(folder, what, config, data, metrics):
    """README.md of a trained model: what it is, from what it was made, and the last metrics. Call it on one rank."""
    sources = ", ".join(f"{kind} `{name}`" for kind, name in {"model": config.model_name or "toy", **data}.items())
    timing = ("runtime", "per_second", "step")
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items()
                        if isinstance(value, (int, float)) and not name.endswith(timing))
    Path(folder, "README.md").write_text(f"""---
library_name: transformers
---
# {Path(folder).resolve().name}

{what}, from {sources}.

| | at the end |
|---|---|
{figures}
""")


def check_finite(loss, done, of="optimizer steps"):
    """Raises InputError before a loss that is not a number reaches a weight: the last checkpoint stays as good as it was."""
    if not torch.isfinite(loss):
        raise InputError(f"the loss is {loss.item()} after {done} {of}: look at the data, or train from the last checkpoint or "
                         "anew with a lower learning rate")


# ------------------------------------------------------------------------------------------------ models
@contextmanager
def only_logits_of(model, select):
    """Inside, `model` computes logits of the tokens under select [B, T] (bool) alone: its output's logits are [N, V].

    With a vocabulary of 100,000, the logits of prompts and padding are most of a batch's memory."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0][select],))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def whole_weights(model):
    """Inside, each rank holds all of the model's weights, where FSDP 2 has sharded them: they are gathered once, and ranks may
    call the model unequally often, as they do while they sample. Enter and leave it on every rank."""
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


class LabelLogProb(torch.autograd.Function):
    """log softmax(logits)[label] for logits [N, V], labels [N], without another tensor of [N, V], forward or backward:

        d log p(label) / d logits = onehot(label) - p

    The gradient is formed in the logits' own memory, so they are gone after the backward pass."""

    @staticmethod
    def forward(ctx, logits, labels):
        logsumexp = torch.cat([part.logsumexp(-1) for part in logits.split(SLICE)])
        ctx.save_for_backward(logits, labels, logsumexp)
        return logits.gather(-1, labels[:, None])[:, 0] - logsumexp

    @staticmethod
    def backward(ctx, gradient):
        logits, labels, logsumexp = ctx.saved_tensors
        result = logits.detach()
        for part, lse, g in zip(result.split(SLICE), logsumexp.split(SLICE), gradient.split(SLICE)):
            part.sub_(lse[:, None]).exp_().mul_(-g[:, None])
        return result.scatter_add_(-1, labels[:, None], gradient[:, None]), None


def logprobs_from_logits(logits, labels, gather=True):
    """logits [..., V], labels [...] -> log p(label) [...] in float32; gather=False: the log-softmax [..., V]."""
    if not gather:
        return F.log_softmax(logits.float(), dim=-1)
    return LabelLogProb.apply(logits.flatten(0, -2).float(), labels.flatten()).view(labels.shape)


def disable_dropout(model):
    """Two policies are compared token by token: noise in either would count as a difference. Stays in train mode, so that
    gradient checkpointing works; some models keep the probability as a number of their own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # dropout, layerdrop, drop_prob
                setattr(module, name, 0.0)


class ValueHead(nn.Module):
    """V(s_t), one number for each token: hidden [..., D] -> values [..., 1], computed in the head's own dtype (float32).

    It starts at zero (Ziegler et al. 2019): the first returns are then the rewards alone, not a random number."""

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
    """A language model and a value head on its last hidden state.

    `pretrained_model` is the Hugging Face model (or PeftModel), `v_head` the ValueHead. `state_dict()` has the model's
    own names, without a prefix, and `v_head.*`."""

    transformers_parent_class = None
    lm_head_namings = ["lm_head", "embed_out"]

    def __init__(self, pretrained_model, summary_dropout_prob=None):
        super().__init__()
        head = pretrained_model.get_output_embeddings()
        if head is None:
            names = ", ".join(self.lm_head_namings)
            raise ValueError(f"{type(pretrained_model).__name__} has no language modelling head ({names}, ...); load a "
                             f"model that {self.transformers_parent_class.__name__} opens")
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
    def from_pretrained(cls, pretrained_model_name_or_path, *args, peft_config=None, is_trainable=False,
                        reward_adapter=None, summary_dropout_prob=None, require_v_head=None, **kwargs):
        """
        pretrained_model_name_or_path: a hub name or a folder (a plain model, one saved by `save_pretrained` here or by
            TRL 0.7, sharded or not, or a PEFT adapter's folder), or a model object.
        peft_config: puts a fresh adapter on the model. is_trainable: an adapter that is loaded goes on training.
        reward_adapter: the folder of a sequence classifier's LoRA adapter, for `compute_reward_score`.
        require_v_head: True: raise where no value head was saved; None: warn; False: a new one is expected.
        Everything else goes to the transformers class. Raises ValueError for a model without LM head."""
        model, head = pretrained_model_name_or_path, None
        if isinstance(model, (str, Path)):
            name, model = str(model), load_pretrained(cls.transformers_parent_class, str(model), is_trainable, *args, **kwargs)
            head = read_value_head(name)
            if head is None and require_v_head is not False:
                missing = f"{name} holds no value head: it starts at zero"
                if require_v_head:
                    raise ValueError(missing)
                warnings.warn(missing)
        if peft_config is not None:
            from peft import get_peft_model
            if hasattr(model, "peft_config"):
                raise ValueError("peft_config is given and the model has an adapter already; give one or the other")
            model = get_peft_model(model, peft_config)
        wrapped = cls(model, summary_dropout_prob)
        if head is not None:
            wrapped.v_head.load_state_dict(head)
        if reward_adapter is not None:
            wrapped._add_reward_adapter(str(reward_adapter))
        return wrapped

    def keep_module_names(self):
        """From now on `state_dict()` names weights as the modules do, `pretrained_model.*`: FSDP finds them by their names."""
        for hook in self._renaming:
            hook.remove()

    def forward(self, input_ids=None, attention_mask=None, select=None, **kwargs):
        """-> (logits [B, T, V] in float32, loss or None, values [B, T]).

        select [B, T] (bool): compute logits and values of these N tokens alone -> logits [N, V], values [N]."""
        hidden = []  # of the last layer, [B, T, D]: what the value head reads
        decoder = self.pretrained_model.get_decoder()
        hook = decoder.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
        if "past_key_values" not in kwargs:
            kwargs.setdefault("use_cache", False)
        try:
            with nullcontext() if select is None else only_logits_of(self.pretrained_model, select):
                output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            hook.remove()
        hidden = hidden[0] if select is None else hidden[0][select]
        return output.logits.float(), output.loss, self.v_head(hidden).squeeze(-1).clone()  # FSDP wants no view

    def generate(self, *args, **kwargs):
        """The language model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """Recomputes activations in the backward pass; non-reentrant, so that it works with frozen embeddings (LoRA)."""
        self.pretrained_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def save_pretrained(self, save_directory, state_dict=None, **kwargs):
        """Writes the model (or the adapter alone) and, beside it, the value head. The folder opens as the plain model
        and as this class. state_dict: as of `self.state_dict()`, when it had to be gathered first. Call on one rank."""
        state_dict = {k.removeprefix("pretrained_model."): v for k, v in (state_dict or self.state_dict()).items()}
        head = {k: v.contiguous() for k, v in state_dict.items() if k.startswith("v_head.")}
        body = {k: v for k, v in state_dict.items() if not k.startswith(("v_head.", "score."))}
        if self.is_peft_model:
            kwargs.setdefault("selected_adapters", [self.pretrained_model.active_adapter])
        os.makedirs(save_directory, exist_ok=True)
        self.pretrained_model.save_pretrained(save_directory, state_dict=body, **kwargs)
        save_file(head, os.path.join(save_directory, VALUE_HEAD_FILE))

    def push_to_hub(self, repo_id, commit_message="Upload model with value head", private=None, token=None, **kwargs):
        """Uploads what `save_pretrained` writes to the hub's repository `repo_id`, which is made where absent."""
        from huggingface_hub import HfApi
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    def _add_reward_adapter(self, folder):
        if not self.is_peft_model:
            raise ValueError("reward_adapter needs a policy with an adapter of its own (peft_config): both share one base")
        from peft.utils import load_peft_weights
        policy = self.pretrained_model.active_adapter
        self.pretrained_model.load_adapter(folder, adapter_name="reward", is_trainable=False)
        self.pretrained_model.set_adapter(policy)
        weights = {k: v for k, v in load_peft_weights(folder, device="cpu").items() if k.endswith("score.weight")}
        if not weights:
            raise ValueError(f"reward_adapter {folder}: no weights of a score layer; train it as a sequence classifier")
        (weight,) = weights.values()
        self.score = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.score.load_state_dict({"weight": weight})
        self.score.requires_grad_(False)

    @torch.no_grad()
    def compute_reward_score(self, input_ids, attention_mask=None, **kwargs):
        """Scores of the reward adapter at every token -> [B, T, labels]; read the last real token of each row."""
        policy, hidden = self.pretrained_model.active_adapter, []
        keep = lambda module, args, output: hidden.append(output[0])
        hook = self.pretrained_model.get_decoder().register_forward_hook(keep)
        self.pretrained_model.set_adapter("reward")
        try:
            self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        finally:
            hook.remove()
            self.pretrained_model.set_adapter(policy)
        return self.score(hidden[0].to(self.score.weight.dtype))


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder-only language model (GPT-2, Llama, Qwen, ...) with a value head."""
    transformers_parent_class = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model (T5, BART, ...) with a value head on the decoder."""
    transformers_parent_class = AutoModelForSeq2SeqLM


def load_tokenizer(name):
    """The tokenizer of a model's folder or hub name, with a pad token: what is padding is known from the attention mask, so
    that a model still learns to end where both are the same."""
    return with_padding(AutoTokenizer.from_pretrained(name))


def with_padding(tokenizer):
    """The tokenizer, or a copy of it that pads with its end-of-sequence token. Raises InputError where it has neither."""
    if tokenizer.pad_token is not None:
        return tokenizer
    if tokenizer.eos_token is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has neither a pad token nor an end-of-sequence token: set "
                         "tokenizer.pad_token")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_language_model(name, dtype):
    """-> tokenizer, model (causal or encoder-decoder; an adapter, on its base model, goes on training) of a hub name or
    folder. Raises InputError."""
    from transformers import AutoConfig
    with explain(f"model_name {name} can't be loaded"):
        tokenizer = load_tokenizer(name)
        seq2seq = AutoConfig.from_pretrained(base_of(name)).is_encoder_decoder
        return tokenizer, load_pretrained(AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM, name, True, dtype=dtype)


def lora_config(config, task_type):
    """config.lora_r, config.lora_alpha -> a peft LoraConfig on all linear layers, or None where lora_r is 0."""
    if not config.lora_r:
        return None
    from peft import LoraConfig
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type=task_type)


def with_adapter(model, peft_config, seed):
    """The model with a fresh adapter on it; equal seeds draw equal ones. Raises InputError where it has one already."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    if hasattr(model, "peft_config"):
        raise InputError("the model has an adapter already, and peft_config asks for another: give one or the other")
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer's switch does that
    set_seed(seed)
    return get_peft_model(model, peft_config)


def base_of(name):
    """The name of the model under a LoRA adapter's folder or hub name; any other model's own name."""
    from transformers.utils import find_adapter_config_file
    if find_adapter_config_file(name) is None:
        return name
    from peft import PeftConfig
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_pretrained(auto_class, name, is_trainable, *args, **kwargs):
    """A plain model, or base model + adapter where `name` is an adapter's folder."""
    base = auto_class.from_pretrained(base_of(name), *args, **kwargs)
    if base_of(name) == name:
        return base
    from peft import PeftModel
    return PeftModel.from_pretrained(base, name, is_trainable=is_trainable)


def read_value_head(name):
    """The weights {"summary.weight", "summary.bias"} of a value head saved in a folder or hub repository, else None.

    Any file of the folder may hold them, under names that begin with `v_head.`: a file of its own (ours), the model's
    file or one of its shards (TRL 0.7). Of safetensors only the headers are read to find out."""
    for kind in (["model*.safetensors", "adapter*.safetensors", VALUE_HEAD_FILE], ["pytorch_model*.bin"]):
        folder = name
        if not os.path.isdir(name):
            from huggingface_hub import snapshot_download
            folder = snapshot_download(name, allow_patterns=kind)  # in the cache already: the model was loaded from it
        files = sorted(file for pattern in kind for file in Path(folder).glob(pattern))
        for file in files:
            head = _head_of(file)
            if head:
                return head
        if any(not file.name.startswith("adapter") for file in files):  # a model in both kinds holds the same in both
            break
    return None


def _head_of(file):
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as f:
            return {k.removeprefix("v_head."): f.get_tensor(k) for k in f.keys() if k.startswith("v_head.")}
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {k.removeprefix("v_head."): v for k, v in weights.items() if k.startswith("v_head.")}


def _without_prefix(module, state_dict, prefix, local_metadata):
    for key in [k for k in state_dict if k.startswith(prefix + "pretrained_model.")]:
        state_dict[prefix + key[len(prefix + "pretrained_model."):]] = state_dict.pop(key)


def _with_prefix(module, state_dict, prefix, *args):
    for key in [k for k in state_dict if k.startswith(prefix)]:
        if not key.startswith((prefix + "v_head.", prefix + "score.")):
            state_dict[prefix + "pretrained_model." + key[len(prefix):]] = state_dict.pop(key)


def create_reference_model(model, num_shared_layers=None, pattern=None):
    """A frozen copy of `model`, in eval mode.

    num_shared_layers: everything up to the decoder's layer of this number (embeddings, and the encoder if there is one)
        is not copied but shared: the same storage in both models, frozen in both. None: a full copy.
    pattern: how layers are named, such as "transformer.h.{layer}"; found by itself where None. Raises ValueError."""
    if num_shared_layers is None:
        return copy.deepcopy(model).requires_grad_(False).eval()
    if pattern is None:
        inner = model.pretrained_model if isinstance(model, PreTrainedModelWrapper) else model
        stack = next(m for m in inner.get_decoder().modules() if isinstance(m, nn.ModuleList))
        pattern = next(name for name, m in model.named_modules() if m is stack) + ".{layer}"
    parameters = list(model.named_parameters())
    first = pattern.format(layer=num_shared_layers) + "."
    cut = next((i for i, (name, _) in enumerate(parameters) if first in name), None)
    if cut is None:
        raise ValueError(f"num_shared_layers={num_shared_layers}: no parameter of the model is named *{first}*; give a "
                         "smaller number, or the pattern of the layers' names")
    shared = [p for _, p in parameters[:cut]]
    # deepcopy takes what the memo holds as copied already: the very same parameters, wherever they are tied
    return copy.deepcopy(model, {id(p): p for p in shared}).requires_grad_(False).eval()
