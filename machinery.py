"""The machinery around the six algorithms: nothing here is needed to understand one.

    setup_ranks, prepare_reference, ...      processes, devices, sharded models
    run, check_ranges, ...                   the command line: flags in, one clear sentence out
    load_rows, load_prompts                  data: a file, a folder or a hub name
    load_language_model, prepare_training    models and adapters to train
    open_run, new_checkpoint, ...            the output folder, its checkpoints and files
    RetiredArguments, SFTArguments, ...      fields of transformers 4, and of later TRL's configs
    TrainerFlags, start_run, Journal, ...    for sft.py, reward.py, dpo.py, iterative_sft.py
    LoopTrainer                              for ppo.py, ddpo.py

What a script on Trainer calls, in order: run, start_run, load_language_model,
load_train_and_eval_rows, then in the constructor read_settings and prepare_training. Trainer itself
calls Journal.
"""
import argparse
import copy
import ctypes
import errno
import gc
import inspect
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Optional, get_args, get_origin

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ExportableState

from chats import is_chat, prompt_ids, question_of, text_to_show
from common import (
    TOY,
    InputError,
    base_of,
    explain,
    freeze_beyond_text,
    hub_arguments,
    load_pretrained,
    number_of_positions,
    set_seed,
    tied_weights_once,
    upload,
    with_adapter,
)


# ----------------------------------------------------------------------------- ranks
def setup_ranks():
    """Prepare torchrun's processes; call it before anything of accelerate or Trainer.

    With GPUs each process takes its own. Without one, the processes form a gloo group."""
    if torch.cuda.is_available():
        # SLURM may show each process its own GPU alone; torch and accelerate count from LOCAL_RANK
        gpu = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        if "LOCAL_RANK" in os.environ:
            os.environ["LOCAL_RANK"] = str(gpu)
        torch.cuda.set_device(gpu)
        torch.set_float32_matmul_precision("high")  # float32 products may use TF32
        return
    keep_freed_memory()
    # one process needs no group, and Trainer warns of one
    if os.environ.get("WORLD_SIZE") == "1":
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
    elif "WORLD_SIZE" in os.environ:
        # without it accelerate would start WORLD_SIZE independent copies of the job
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def prepare_process(args):
    """Prepare the process of a Trainer with these TrainingArguments.

    Raises InputError for several GPUs in one process, and for DeepSpeed on a CPU."""
    # report_to=None: no tracker. TrainingArguments makes it [None], which Trainer refuses
    if args.report_to == [None]:
        args.report_to = []
    # Trainer would split each batch among threads, which the algorithms here do not support
    if args.n_gpu > 1:
        raise InputError(f"this process sees {args.n_gpu} GPUs: start one process per GPU with "
                         f"torchrun --nproc_per_node {args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0")
    # each rank reads a stream itself: the main rank can't send rows of unequal length
    args.accelerator_config = copy.copy(args.accelerator_config)
    args.accelerator_config.dispatch_batches = False
    if args.deepspeed and args.device.type == "cpu":  # accelerate would go on without it
        raise InputError("deepspeed: accelerate starts no DeepSpeed on a CPU; take GPUs, or shard "
                         "the model with --fsdp full_shard")
    if args.fsdp:
        # Trainer's accelerator sets it, but only after prepare_training has looked at it
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    if not torch.cuda.is_available():
        keep_freed_memory()


def skip_evaluation(args):
    """Leave evaluation out: there are no rows for it. Raises InputError if an argument needs it."""
    needs = {"load_best_model_at_end": True, "save_strategy": "best", "eval_on_start": True,
             "lr_scheduler_type": "reduce_lr_on_plateau"}
    for name, value in needs.items():
        if getattr(args, name) == value:
            raise InputError(f"{name}={value}: it needs evaluations; give an eval_dataset")
    args.eval_strategy = "no"


def prepare_gradients(accelerator):
    """Let DDP hold gradients once, and FSDP sum them in float32. Raises InputError for FSDP 1."""
    if accelerator.distributed_type != DistributedType.FSDP:
        handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
        handler.gradient_as_bucket_view = True  # DDP would keep a second copy, in its buckets
        accelerator.ddp_handler = handler
        return
    if not accelerator.is_fsdp2:
        raise InputError("fsdp_version=1 (accelerate's or Trainer's configuration): only FSDP 2 is "
                         'supported; set FSDP_VERSION=2, or "version": 2 in fsdp_config')
    plugin = accelerator.state.fsdp_plugin
    if plugin.activation_checkpointing:
        raise InputError("activation_checkpointing (of FSDP's configuration): it renames modules, "
                         "so that an adapter would be saved empty; take --gradient-checkpointing")
    if plugin.mixed_precision_policy is not None:
        # weights are gathered in the type of mixed precision; outputs keep the type they have
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy,
                                                reduce_dtype=torch.float32, output_dtype=None)
    # reduce gradients after each micro-batch: unreduced ones take 4 bytes per weight on each rank
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def prepare_reference(accelerator, model):
    """Freeze a reference model and move it to the device, in shards if the policy is in shards.

    It computes in the policy's precision. Returns the model to call."""
    model = model.requires_grad_(False).eval()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed
        config = {"train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it, and does not use it
                  "bf16": {"enabled": accelerator.mixed_precision == "bf16"},
                  "fp16": {"enabled": accelerator.mixed_precision == "fp16"},
                  # lower stages shard no weight
                  "zero_optimization": {"stage": 3 if is_deepspeed_zero3_enabled() else 0}}
        model = deepspeed.initialize(model=model, config=config)[0]
        model.eval()  # an engine's own method returns nothing
        return model
    if accelerator.mixed_precision == "bf16":
        halve_matrices(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return model.to(accelerator.device)
    share_embeddings(model)
    model = fsdp2_prepare_model(accelerator, model)  # accelerator.prepare asks for an optimizer
    register_fsdp_forward_method(model, "generate")  # for generate_ref_response
    return model


def halve_matrices(model):
    """Convert the matrices of a frozen model to bfloat16, in place.

    Autocast would convert them in each forward pass: outputs stay the same to the bit. It does not
    convert embeddings, so these stay as they are."""
    embeddings = model.get_input_embeddings().weight
    for module in model.modules():
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and module.weight is not embeddings
        if is_linear and module.weight.dtype == torch.float32:
            # a new parameter: the policy may share the old one
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)


def keep_freed_memory():
    """Let malloc keep large freed blocks, on CPUs.

    By default glibc returns each block to the system, which zeroes it again for the next tensor:
    a fifth of the time of a PPO step."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ----------------------------------------------------------------------------- the command line
def run(main, config_class, toy="", own="", lora=""):
    """Run a script's command line: parse the flags of `config_class`, call `main(config)`.

    toy, own, lora: default flags for the toy model, for all other models, and for a LoRA of one.
    An InputError ends the process with its one sentence and status 1; any other error keeps its
    traceback. torchrun stops the other ranks as soon as one has failed, and prints its message
    last."""
    import datasets
    import transformers
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory")  # Trainer asks for it on CPUs too
    # peft reads a property of models by its old name, and finds out about GPT-2's layers itself
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
    setup_ranks()  # before the config: TrainingArguments looks for devices and ranks
    rules = tyro.constructors.ConstructorRegistry()
    rules.primitive_rule(json_flag)
    # of a flag that is given twice, the last one counts
    words = [*default_flags(sys.argv[1:], toy, own, lora), *sys.argv[1:]]
    config = tyro.cli(config_class, description=main.__doc__.split("\n\n")[0], registry=rules,
                      args=words)
    try:
        record(main)(config)
    except Exception as error:
        if is_full(config.output_dir, error):
            error = InputError(f"output_dir={config.output_dir}: the disk is full; free some "
                               "space, then resume from the last checkpoint there")
        if not isinstance(error, InputError):
            leave_group(traceback.format_exc())
            raise
        sentence = f"{Path(sys.argv[0]).name}: error: {error}"
        get_error_handler().record_exception(InputError(sentence))  # torchrun prints it last
        leave_group(sentence)
        sys.exit(sentence)
    # Free the trainer, which holds itself: gloo's threads end only with the last reference to their
    # group, and a thread that outlives Python aborts the process.
    gc.collect()
    # only after success: while another rank waits in a collective, this call could wait for it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_group(message):
    """Print a message and end this process at once, if it is one of several ranks.

    A usual exit frees nccl's communicator, which may wait for ranks that wait for this one."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Other ranks fail as this one ends. torchrun finds the first failure by whole seconds, so
        # this rank's record has to be a second older.
        time.sleep(1.1)
        os._exit(1)


def default_flags(words, toy, own, lora):
    """Return the default flags for the model that `words` name, except those that `words` give.

    Prints them unless the model is the toy. own and lora: pairs "--flag value", no bare flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-name", "--model_name")
    parser.add_argument("--lora-r", "--lora_r", default="0")
    model, _ = parser.parse_known_args(words)
    if model.model_name in (None, "None"):
        return toy.split()
    if model.lora_r != "0" or Path(model.model_name, "adapter_config.json").is_file():
        own = f"{own} {lora}"
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    # a batch size that the user gives is that of a step, unless accumulation is given too
    if "--per-device-train-batch-size" in given:
        given.add("--gradient-accumulation-steps")
    pairs = re.findall(r"--\S+ [^-]\S*", own)
    flags = " ".join(pair for pair in pairs if pair.split()[0] not in given)
    if flags:
        print_once(f"defaults for this model: {flags}")
    return flags.split()


def print_once(line):
    """Print a line on the main rank; works before there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def json_flag(field):
    """Let a field such as --fsdp-config take a JSON dict or a file's name (a rule for tyro)."""
    if not any(dict in (kind, get_origin(kind)) for kind in get_args(field.type)):
        return None

    def read(words):
        return json.loads(words[0]) if words[0].startswith("{") else words[0]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="JSON|FILE", instance_from_str=read,
        is_instance=lambda value: isinstance(value, (dict, str, type(None))),
        str_from_instance=lambda value: [json.dumps(value)])


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
    """Raise InputError if `function` does not take all `arguments` (a dict, of option `name`)."""
    known = inspect.signature(function).parameters
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise InputError(f"{name}={arguments}: {function.__name__} has no argument "
                         f"{', '.join(unknown)}; its arguments are {', '.join(known)}")


def check_dicts(config, *names):
    """Raise InputError for a field of these names that is no dict."""
    for name in names:
        if not isinstance(getattr(config, name), dict):
            raise InputError(f"{name}={getattr(config, name)!r}: give a dict")


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
    """Load the rows of one split of a dataset. Returns a datasets.Dataset. Raises InputError.

    name: a local .jsonl, .json, .csv, .parquet or .txt file (each line is a row `text`), a folder
    written by `save_to_disk` (or any folder that `load_dataset` reads), or a name on the hub.
    split: None: the only one, or the first of `usual` that exists. config: the configuration of a
    dataset that has several. flag: the name of the option `split`, for errors."""
    splits = load_splits(name, config)
    if split is None:
        candidates = usual if len(splits) > 1 else splits
        split = next((candidate for candidate in candidates if candidate in splits), None)
    if split not in splits:
        raise InputError(f"{flag}={split} (dataset {name}): it has the splits {', '.join(splits)}; "
                         "name one of them")
    return splits[split]


def load_splits(name, config=None):
    """Load a dataset. Returns {split: datasets.Dataset}; rows without a split are `train`."""
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
    """Return options for `rows.map`; a stream takes none.

    A machine's first process fills the cache, the others read it. It does not read the cache of an
    earlier run: the code may have changed."""
    from datasets import IterableDataset
    if isinstance(rows, IterableDataset):
        return {}
    return {"num_proc": num_proc, "load_from_cache_file": args.local_process_index > 0}


def report_rows(name, what, count, total, flags, why):
    """Print how many rows of a dataset were truncated or dropped, and why, on the main rank.

    what: "truncated" or "dropped". flags: whether it was, per row; read up to the first."""
    if count:
        first = next(i for i, flag in enumerate(flags) if flag)
        print_once(f"{name}: {what} {count} of {total} rows, row {first} the first: {why}")


PROMPT_COLUMNS = ("query", "prompt", "messages", "text", "input_ids")


def load_prompts(name, tokenizer, max_length=None, longest=None, keep_columns=False, split=None,
                 config=None):
    """Load prompts, and check their lengths. Returns a `Prompts`.

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
    is_dropped = []
    with explain(f"dataset {name}: column {column} can't be tokenized"):
        for number, (length, has_turns) in enumerate(prompt_lengths(rows, column, tokenizer)):
            # a truncated chat would lack its generation prompt
            is_dropped.append(has_turns and length > limit)
            if is_dropped[-1]:
                continue
            length = min(length, limit)
            if length == 0:
                raise InputError(f"dataset {name}, row {number}: {column} is empty; remove the row")
            if longest is not None and length > longest:
                raise InputError(f"dataset {name}, row {number}: {length} tokens leave no room "
                                 f"for a response, the most is {longest}; set --max-query-length "
                                 "or reduce --max-new-tokens")
    report_rows(f"dataset {name}", "dropped", sum(is_dropped), len(rows), is_dropped,
                f"chats longer than max_query_length={max_length} tokens")
    if any(is_dropped):
        rows = rows.select([i for i, dropped in enumerate(is_dropped) if not dropped])
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
    """Tokenize a dataset's prompts one by one, when asked for: a million take no memory.

    A row is {"query", "input_ids", "messages", "metadata", "shown"}: the prompt's text, its token
    ids, the messages of a chat or None, the whole row of the dataset, and what samples show (of a
    chat the last user turn). A slice is a list of rows. Arguments: see load_prompts."""

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


# ----------------------------------------------------------------------------- models and adapters
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
    """Return the arguments of from_pretrained that a script's flags give."""
    flags = {field.name: getattr(config, field.name) for field in fields(LoadingFlags)}
    return {"dtype": config.torch_dtype, **{name: flag for name, flag in flags.items() if flag}}


def load_tokenizer(name, **kwargs):
    """Load the tokenizer of a model, by folder or hub name, with a pad token.

    kwargs: those of the model's from_pretrained, most of which a tokenizer does not take."""
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
    """Load the configuration of a model, or of a LoRA adapter's base model."""
    base, kwargs = base_of(name, **kwargs)
    return AutoConfig.from_pretrained(base, **hub_arguments(kwargs, "trust_remote_code"))


def load_language_model(name, **kwargs):
    """Load a tokenizer and a language model by hub name or folder. Raises InputError."""
    with explain(f"model_name {name} can't be loaded"):
        return load_tokenizer(name, **kwargs), load_model(name, **kwargs)


def load_model(name, is_encoder_decoder=None, **kwargs):
    """Load a language model, or an adapter on its base model, which trains further.

    is_encoder_decoder: None: as its configuration says. kwargs: see load_pretrained."""
    if is_encoder_decoder is None:
        is_encoder_decoder = load_config(name, **kwargs).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return load_pretrained(auto_class, name, True, **kwargs)


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


def prepare_training(model, peft_config=None, seed=None):
    """Prepare a model for training. Returns it, with a fresh adapter if peft_config asks for one.

    Freezes what text does not reach, and warns of half precision. seed: of the adapter's weights.
    Raises InputError if nothing would train."""
    if peft_config is not None and hasattr(model, "peft_config"):
        warnings.warn("peft_config (or lora_r) has no effect: the model has an adapter already, "
                      "which trains further", stacklevel=4)
    elif peft_config is not None:
        model = with_adapter(model, peft_config, seed)
    if hasattr(model, "peft_config"):
        plain = model.get_base_model()
        train_heads_in_float32(plain)
        for config in model.peft_config.values():
            base = config.base_model_name_or_path
            if base and os.path.isdir(base):  # the saved adapter opens in every working directory
                config.base_model_name_or_path = os.path.abspath(base)
    else:
        plain = model
    freeze_beyond_text(plain)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        share_embeddings(plain)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model: none of its parameters requires a gradient, so nothing would "
                         "train; load an adapter with is_trainable=True")
    warn_of_half_precision(model)
    return model


def share_embeddings(model):
    """Let both stacks of an encoder-decoder call one module if their embeddings share a weight.

    FSDP 2 shards input and output embeddings together, and refuses a third module of their weight.
    The model computes the same and saves the same file. `state_dict()` lists the weight once per
    remaining module: torch can't load shards of a module that has two names."""
    embeddings = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            is_alike = isinstance(module, nn.Embedding) and type(module) is type(embeddings)
            if is_alike and module is not embeddings and module.weight is embeddings.weight:
                delattr(parent, name)
                vars(parent)[name] = embeddings  # an attribute, no longer a child


def train_heads_in_float32(model):
    """Convert to float32 the heads that train in full on a base model in half precision."""
    backbone = set(model.base_model.parameters())
    for module in model.modules():
        own = set(module.parameters(recurse=False))
        is_half = all(p.requires_grad and p.dtype != torch.float32 for p in own)
        if own and is_half and not own & backbone:
            module.float()
            # not a constant: FSDP may gather the weight in bfloat16
            module.register_forward_pre_hook(lambda head, args: (args[0].to(head.weight.dtype),))


def scale_learning_rate(rate, model):
    """Return rate x sqrt(1e5 / number of weights): larger models take smaller steps.

    An adapter takes ten times larger steps than all weights do (Hu et al. 2021, LoRA)."""
    rate *= math.sqrt(1e5 / number_of_weights(model))
    rate *= 10 if hasattr(model, "peft_config") else 1
    print_once(f"learning rate {rate:.2g}, by the model's size; --learning-rate gives another")
    return rate


def number_of_weights(model):
    """Count all weights of a model, its shards on other ranks included."""
    # under ZeRO-3 a parameter itself is empty, and ds_numel its size
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def use_few_threads(model):
    """Use one thread for a model below a million weights, which more threads slow down."""
    if number_of_weights(model) < 10**6:
        torch.set_num_threads(1)


def trained_types(model):
    """Return the dtypes of the weights that train, by name, such as {"float32"}."""
    types = {p.dtype for p in model.parameters() if p.requires_grad}
    return {str(dtype).removeprefix("torch.") for dtype in types}


def warn_of_half_precision(model):
    """Warn if weights that are trained are in half precision."""
    for kind in trained_types(model) - {"float32"}:
        warnings.warn(f"torch_dtype={kind}: weights of this type are trained, so steps below its "
                      "precision are lost; give float32, with --bf16 for speed", stacklevel=4)


# ----------------------------------------------------------------------------- output files
def open_run(output_dir, resume_from, default):
    """Return the output folder, and the checkpoint to resume from or None. Raises InputError.

    resume_from: a checkpoint, or a run's folder, whose newest whole checkpoint counts; the run
    starts if it is output_dir itself and holds none yet, so that one command starts and resumes.
    output_dir: None: the folder of the checkpoint; for a fresh run, `default`."""
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise InputError(f"SLURM_STEP_NUM_TASKS={os.environ['SLURM_STEP_NUM_TASKS']}: srun started "
                         "as many separate runs; let it start torchrun, once per node "
                         "(docs/scaling.md), or unset the variable")
    own_folder = Path(output_dir or default).resolve()
    if resume_from and Path(resume_from).resolve() == own_folder and not checkpoints(own_folder):
        print_once(f"{resume_from} holds no checkpoint yet: the run starts")
        resume_from = None
    checkpoint = newest_checkpoint(resume_from) if resume_from else None
    out = Path(output_dir or (checkpoint.parent if checkpoint else default))
    continues = checkpoint is not None and checkpoint.parent.resolve() == out.resolve()
    newest = [folder.name for folder in checkpoints(out)[-1:]]
    # a run's folder may hold newer ones: they are damaged
    is_named = continues and Path(resume_from).name == checkpoint.name
    if is_named and checkpoint.name not in newest:
        raise InputError(f"resume from {checkpoint}: {out} holds the newer {', '.join(newest)}; "
                         "remove it, or give another --output-dir")
    writable_folder(out, fresh=not continues)
    return out, checkpoint


def writable_folder(path, fresh):
    """Create the output folder, and check that it is writable. Raises InputError.

    fresh: the run is new, or resumed from another folder. Such a run refuses a folder that holds
    checkpoints, and removes the files to which runs append."""
    path = Path(path)
    with explain(f"output_dir {path} can't be written"):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    left = sorted(folder.name for folder in path.glob("checkpoint-*"))
    if fresh and left:
        raise InputError(f"output_dir {path} holds {left[-1]} of an earlier run: resume from it, "
                         "choose another --output-dir, or remove it")
    if fresh and os.environ.get("RANK", "0") == "0":
        for name in ("metrics.jsonl", "samples.jsonl"):
            (path / name).unlink(missing_ok=True)


def is_full(folder, error):
    """Return whether an error came from a full disk, the folder's. A library may not say so."""
    try:  # to write
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as own_error:
        error = own_error
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def checkpoints(path):
    """List the checkpoint-<n> folders in the folder `path`, oldest first."""
    found = [folder for folder in Path(path).glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def checkpoints_up_to(path):
    """List a run's checkpoints up to `path`, from which it is resumed, oldest first."""
    path = Path(path).resolve()
    found = checkpoints(path.parent)
    return found[:found.index(path) + 1] if path in found else []


def newest_checkpoint(path):
    """Return `path` if it is a checkpoint-<n>, else the newest whole one in it. Raises InputError.

    A kill while Trainer saves leaves half a checkpoint."""
    path = Path(path)
    if path.name.startswith("checkpoint-") and path.is_dir():
        check_checkpoint(path)
        return path
    for folder in reversed(checkpoints(path)):
        try:
            check_checkpoint(folder)
            return folder
        except InputError as error:
            warnings.warn(f"resume from {path}: passed over {folder.name}: {error}", stacklevel=3)
    raise InputError(f"resume from {path}: no whole checkpoint-<n> there; start again with another "
                     "--output-dir, or give the output folder of another run")


# what a checkpoint holds: files of Trainer and of accelerate
PARTS = {"weights": ("*.safetensors", "pytorch_model*"), "optimizer": ("*optimizer*",),
         "schedule": ("scheduler*", "custom_checkpoint*"),
         "random numbers": ("rng_state*", "random_states*"),
         "state": ("trainer_state.json", "custom_checkpoint*")}
ZIPPED = (".pt", ".pth", ".bin", ".pkl", ".distcp")  # written by torch.save


def check_checkpoint(folder):
    """Open every file of a checkpoint to find damage early. Raises InputError."""
    with explain(f"checkpoint {folder} is damaged; give the folder of its run, whose "
                 "newest whole checkpoint counts"):
        for part, names in PARTS.items():
            has_part = any(file for name in names for file in folder.rglob(name))
            is_deepspeeds = (folder / "latest").exists()  # it has folders of its own
            if not has_part and not is_deepspeeds:
                raise FileNotFoundError(f"it holds no {part}")
        for file in folder.rglob("*"):
            if file.suffix == ".safetensors":
                safe_open(file, "pt").keys()
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix in ZIPPED and file.stem != "training_args":
                zipfile.ZipFile(file).close()


@contextmanager
def new_checkpoint(accelerator, folder, number, own, keep=None, best=None):
    """Yield a folder to write to, which becomes folder/checkpoint-<number>. Call on every rank.

    It gets this name when it is complete: a run that is killed meanwhile has the one before.
    own: the run's checkpoints, oldest first. The new one is appended; all but the last `keep`
    (None: all) and the one whose path is `best` are removed. No other checkpoint is removed.
    Raises InputError if the first one finds another run's of this or a larger number."""
    folder = Path(folder).resolve()
    final, aside = folder / f"checkpoint-{number}", folder / "checkpoint.tmp"
    if not any(path.parent == folder for path in own):  # the run's first one here
        for newest in checkpoints(folder)[-1:]:
            if int(newest.name[11:]) >= number:
                raise InputError(f"{newest} is there already, and a resume would take it: load it, "
                                 "save to another folder, or remove it")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    aside.mkdir(parents=True, exist_ok=True)
    yield aside
    accelerator.wait_for_everyone()
    own[:] = [path for path in own if path.parent == folder and path != final] + [final]
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in own[:-keep] if keep else []:
            if best is None or old.name != Path(best).name:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def append_rows(path, rows):
    """Append rows to a .jsonl file. JSON has no NaN and no infinity: they become null."""
    with Path(path).open("a") as file:
        for row in rows:
            row = {name: finite_or_none(value) for name, value in row.items()}
            file.write(json.dumps(row) + "\n")


def finite_or_none(value):
    """Return the value, or None for a float that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count_lines(folder):
    """Return {name: lines} of metrics.jsonl and samples.jsonl; a checkpoint holds it."""
    paths = [Path(folder, name) for name in ("metrics.jsonl", "samples.jsonl")]
    return {path.name: path.read_bytes().count(b"\n") if path.exists() else 0 for path in paths}


def cut_lines(folder, lines):
    """Truncate files to `lines` {name: number}: a resumed run writes again what followed."""
    for name, kept in lines.items():
        path = Path(folder, name)
        if path.exists():
            written = path.read_bytes().splitlines(keepends=True)
            os.truncate(path, sum(map(len, written[:kept])))


# what the data, their order and the numbers of a run depend on, in the six configs
ORDER = ("world_size", "seed", "batch_size", "per_device_train_batch_size",
         "gradient_accumulation_steps", "prompts_per_round", "sample_batch_size",
         "sample_num_batches_per_epoch", "dataset", "dataset_split", "query_dataset", "prompts",
         "model_name", "lora_r", "lora_alpha", "learning_rate")


def data_order(config, **more):
    """Return {name: value} of what a resume compares (ORDER); a checkpoint holds it."""
    values = {name: getattr(config, name) for name in ORDER if hasattr(config, name)}
    return {name: str(value) for name, value in {**values, **more}.items()}


def identify(rows):
    """Return the number of rows, and a checksum of about 100 of them: a resume compares both.

    Rows of a class of the user's may be drawn as they are read: these are only counted."""
    from datasets import Dataset
    if rows is None:
        return {}
    if not isinstance(rows, (list, Dataset)):
        return {"rows": len(rows)}
    plain = rows.with_format(None) if isinstance(rows, Dataset) else rows  # without a transform
    some = [plain[i] for i in range(0, len(rows), max(1, len(rows) // 100))]
    text = json.dumps(some, default=lambda value: value.tolist() if torch.is_tensor(value)
                      else type(value).__name__)
    return {"rows": len(rows), "checksum_of_rows": f"{zlib.crc32(text.encode()):08x}"}


def warn_of_other_order(saved, now):
    """Warn if a resumed run does not see the data in the order of the run that was killed."""
    for name, value in now.items():
        if saved.get(name, value) != value:
            warnings.warn(f"{name}={value}: it was {saved[name]} up to the checkpoint, so the "
                          "numbers differ from an uninterrupted run's", stacklevel=3)


def log_samples(folder, title, rows):
    """Print samples and append them to samples.jsonl. Call on one rank.

    rows: dicts of numbers (printed first) and texts (later lines indented), such as {"update": 0,
    "query": "the plot was", "response": " bland.", "score": -2.9}."""
    tqdm.write(f"\n{title}")
    for row in rows:
        numbers = [f"{value:+6.2f}  " for value in row.values() if isinstance(value, float)]
        texts = [value for value in row.values() if isinstance(value, str)]
        tqdm.write("  " + "".join(numbers) + " |".join(texts).replace("\n", "\n      "))
    append_rows(Path(folder, "samples.jsonl"), rows)


class Bar(tqdm):
    """Show a progress bar on the main rank. If stderr is no terminal, `show` prints lines."""

    def __init__(self, is_main, unit, **settings):
        is_hidden = not is_main or None  # None: if stderr is no terminal
        super().__init__(unit=unit, disable=is_hidden, **settings)
        self.unit = unit  # a disabled tqdm does not set it
        self.prints_lines = is_main and self.disable

    def show(self, number, **numbers):
        """Show numbers {name: text} of the step with this number."""
        self.set_postfix(numbers, refresh=False)
        self.update(number - self.n)
        if self.prints_lines:
            line = ", ".join(f"{name} {text}" for name, text in numbers.items())
            print(f"{self.unit} {number}/{self.total}: {line}", flush=True)


def write_model_card(folder, what, config, data, metrics):
    """Write README.md of a trained model: what it is, its sources, its last metrics.

    Call on one rank."""
    sources = {"model": config.model_name or "toy", **data}
    sources = ", ".join(f"{kind} `{name}`" for kind, name in sources.items())
    timing = ("runtime", "per_second", "step")
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())
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


def hidden_fields(**fields):
    """Make a base class for configs of fields {name: (type, default)} that --help does not list."""
    return make_dataclass("HiddenFields", [
        (name, Annotated[kind, tyro.conf.Suppress], field(default=default))
        for name, (kind, default) in fields.items()])


RetiredArguments = hidden_fields(**{
    name: (kind, default) for name, (kind, default, _) in RETIRED.items()})
# Arguments of the trainers that TRL 0.9 and later has in its configs: see read_settings.
SFTArguments = hidden_fields(
    max_length=(Optional[int], None), dataset_kwargs=(Optional[dict], None),
    model_init_kwargs=(Optional[dict], None), dataset_batch_size=(Optional[int], 1000),
    num_of_sequences=(int, 1024), chars_per_token=(float, 3.6))
DPOArguments = hidden_fields(
    model_init_kwargs=(Optional[dict], None), ref_model_init_kwargs=(Optional[dict], None),
    model_adapter_name=(Optional[str], None), ref_adapter_name=(Optional[str], None),
    disable_dropout=(bool, True), is_encoder_decoder=(Optional[bool], None),
    label_pad_token_id=(int, -100), padding_value=(int, 0))


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


# ----------------------------------------------------------------------------- files on Trainer
@dataclass
class TrainerFlags(RetiredArguments):
    """Hold the fields that the four configs on TrainingArguments share."""

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
        replace_retired(self)
        if self.report_to is None:
            self.report_to = "none"
        if (self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available():
            self.use_cpu = True  # without it TrainingArguments refuses bfloat16 on a CPU
        # transformers 5 has renamed it, and warns of the old name; the default is ours
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()


def start_run(config):
    """Check the output folder and the checkpoint to resume from, and seed all random numbers.

    Returns the folder, and the checkpoint or None. Raises InputError."""
    prepare_process(config)  # a Trainer does so too, but only when the model has been loaded
    default = type(config).__dataclass_fields__["output_dir"].default
    given = None if config.output_dir == default else config.output_dir
    out, checkpoint = open_run(given, config.resume_from_checkpoint, default)
    config.output_dir = str(out)
    if checkpoint:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
        is_over = state["epoch"] >= config.num_train_epochs
        if config.max_steps > 0:
            is_over = state["global_step"] >= config.max_steps
        config.eval_on_start = False  # the first start has evaluated
        if is_over:
            # only the end of the run is left; within an epoch Trainer would take one more update
            config.max_steps, config.num_train_epochs = -1, 0
        else:
            check_resume(config, state)
    set_seed(config.seed)  # a fresh head or adapter is the same on all ranks
    return out, checkpoint and str(checkpoint)


def check_resume(config, state):
    """Raise InputError for arguments that a resume can't change. state: of a checkpoint."""
    journal = state["stateful_callbacks"].get("Journal")
    if not journal:
        return
    saved, now = journal["attributes"]["order"], data_order(config)
    for name in ("lora_r", "learning_rate"):
        if name in saved and saved[name] != now[name] != "None":
            raise InputError(f"{name}={now[name]}: the checkpoint goes on with {saved[name]}; give "
                             "the same, or start again")
    sizes = ["world_size", "per_device_train_batch_size", "gradient_accumulation_steps"]
    if hasattr(config, "prompts_per_round"):  # of each rank
        del sizes[0]
    before, rows = (math.prod(int(order[name]) for name in sizes) for order in (saved, now))
    if before != rows and config.max_steps <= 0:  # Trainer counts epochs in updates
        raise InputError(f"{' x '.join(sizes)} = {rows}: an update took {before} rows up to the "
                         "checkpoint; give as many, or max_steps")


def load_train_and_eval_rows(config, toy_rows, toy_eval_rows):
    """Load the rows of config.dataset, and those to evaluate on, or None. Raises InputError.

    toy_rows, toy_eval_rows: files of toy/, used without config.dataset."""
    dataset = config.dataset or TOY / toy_rows
    rows = load_rows(dataset, config.dataset_split, config.dataset_config)
    held_out = load_eval_rows(config, dataset)
    if held_out is None and not config.dataset:
        held_out = load_rows(TOY / toy_eval_rows)
    return rows, held_out


def load_eval_rows(config, dataset):
    """Load the rows to evaluate on, or return None.

    They are a split of config.eval_dataset or, if only config.eval_dataset_split is given, of
    `dataset`, which is trained on. Raises InputError if that would be the training split."""
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
    trained_on = config.dataset_split if is_same else None
    usual = [held_out for held_out in ("test", "validation") if held_out != trained_on]
    return load_rows(name, split, settings, usual, "eval_dataset_split")


def map_sets(function, datasets, *args):
    """Apply a function to a dataset, or to each of a dict of datasets."""
    if isinstance(datasets, dict):
        return {name: function(dataset, *args) for name, dataset in datasets.items()}
    return function(datasets, *args)


def check_split(train_dataset):
    """Raise InputError for a dict of splits, which `load_dataset(name)` returns."""
    if isinstance(train_dataset, dict):
        raise InputError(f"train_dataset={type(train_dataset).__name__} of the splits "
                         f"{', '.join(train_dataset)}: training takes one; give rows['train']")


def read_stream(rows):
    """Read a stream into a list; anything else stays as it is.

    Ranks fill the last batch of a stream with repeated rows, which an evaluation would count."""
    from datasets import IterableDataset
    is_stream = isinstance(rows, (IterableDataset, torch.utils.data.IterableDataset))
    return list(rows) if is_stream else rows


class ShardedTrainer:
    """Prepare gradients for several ranks, save whole models, evaluate all rows (for Trainer)."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        prepare_gradients(self.accelerator)

    @property
    def is_sharded(self):
        """Return whether FSDP or DeepSpeed shards the model, at the latest when training begins."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def get_eval_dataloader(self, eval_dataset=None):
        """Return Trainer's loader of all rows: dataloader_drop_last is for training alone."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the model as Trainer does, whole under FSDP too. Call on every rank."""
        plugin = None  # of FSDP; a checkpoint keeps the type of its configuration
        if self.is_fsdp_enabled and not _internal_call:
            plugin = self.accelerator.state.fsdp_plugin
            configured = plugin.state_dict_type
            plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            with tied_weights_once(self.model):
                super().save_model(output_dir, _internal_call)
        finally:
            if plugin:
                plugin.set_state_dict_type(configured)


class TokenMeanEvaluation:
    """Make eval_loss the mean over all tokens of all ranks, not over batches (a mixin for Trainer).

    `compute_loss` calls add_to_evaluation when the model is in eval mode."""

    eval_sums = torch.zeros(2)  # the sum of the losses, and their number

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


class Journal(TrainerCallback, ExportableState):
    """Write a Trainer's metrics to metrics.jsonl and show a progress bar, on the main rank.

    Each line is {"update": optimizer steps so far, "loss": ..., ...}. A checkpoint holds `state()`,
    so that a resumed run writes each line once, with the numbers of an uninterrupted run.
    phases: what the bar says between and within epochs, such as ("sampling", "learning").
    rows: the dataset; a resume with other rows warns."""

    def __init__(self, folder, phases=("", ""), rows=None):
        self.folder, self.phases, self.rows = folder, phases, identify(rows)
        self.order, self.save_later = {}, False

    def state(self):
        arguments = {"folder": str(self.folder), "phases": self.phases}
        return {"args": arguments,
                "attributes": {"lines": count_lines(self.folder), "order": self.order}}

    def on_train_begin(self, args, state, control, **kwargs):
        main = state.is_world_process_zero
        self.order = data_order(args, **self.rows)
        lines = {"metrics.jsonl": 0}
        if state.global_step and "Journal" in state.stateful_callbacks:
            saved = state.stateful_callbacks["Journal"]["attributes"]
            lines = saved["lines"]
            warn_of_other_order(saved["order"], self.order)
        if main:
            cut_lines(self.folder, lines)
        self.bar = Bar(main and not args.disable_tqdm, "update", total=state.max_steps,
                       initial=state.global_step, desc=self.phases[0] or None)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.bar.set_description(self.phases[1])

    def on_epoch_end(self, args, state, control, **kwargs):
        self.bar.set_description(self.phases[0])
        control.should_save |= self.save_later
        self.save_later = False
        self.log_before_saving(args, control)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)
        is_over = state.global_step >= state.max_steps  # a short run has a loss, too
        control.should_log |= is_over
        self.log_before_saving(args, control)
        if is_over or (state.epoch or 0) % 1 == 0:  # save after the evaluation of the epoch
            self.save_later, control.should_save = control.should_save, False

    def log_before_saving(self, args, control):
        """End a line's mean where a checkpoint may be written: a resume begins a new one there."""
        may_be_best = args.save_strategy == "best" and control.should_evaluate
        control.should_log |= control.should_save or may_be_best

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_loss" in logs:  # Trainer's own begins where the run was resumed
            logs["train_loss"] = mean_loss(state.log_history)
        if state.is_world_process_zero:
            append_rows(Path(self.folder, "metrics.jsonl"), [{"update": state.global_step, **logs}])
            if "loss" in logs:
                self.bar.show(state.global_step, loss=f"{logs['loss']:.4f}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        timing = ("runtime", "per_second", "epoch")
        shown = [f"{name} {value:.4g}" for name, value in metrics.items()
                 if not name.endswith(timing)]
        if state.is_world_process_zero:
            tqdm.write(f"epoch {state.epoch or 0:.2f}: {', '.join(shown)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def mean_loss(log_history):
    """Return the mean over all steps of a log, whose lines hold means of the steps in between."""
    total, last = 0.0, 0
    for row in log_history:
        if "loss" in row:
            total += row["loss"] * (row["step"] - last)
            last = row["step"]
    return total / max(last, 1)


def last_evaluation(trainer):
    """Return the final evaluation's metrics; evaluate again if the best model was loaded since."""
    last = trainer.state.log_history[-2:][0]  # the last line is that of train() itself
    is_current = "eval_loss" in last and not trainer.args.load_best_model_at_end
    return last if is_current else trainer.evaluate()


# ----------------------------------------------------------------------------- ppo.py and ddpo.py
class LoopTrainer:
    """Ranks, trackers and checkpoints of a trainer that owns its loop (PPOTrainer, DDPOTrainer).

    A subclass has a `config`, an `output_dir` and an `optimizer`, and adds to `state_dict` and
    `load_state_dict` what a checkpoint holds besides weights, optimizer and random numbers."""

    keep_checkpoints = 1
    lr_scheduler = None
    dataset = None  # DDPO draws its prompts from a function
    lines = {"metrics.jsonl": 0}  # lines that a run keeps of the files in its folder

    def start_accelerator(self, project, **settings):
        """Make the accelerator. Raises InputError.

        project: arguments of ProjectConfiguration; settings: of Accelerator. The config's
        project_kwargs and accelerator_kwargs override them."""
        config = self.config
        check_arguments("project_kwargs", config.project_kwargs, ProjectConfiguration)
        check_arguments("accelerator_kwargs", config.accelerator_kwargs, Accelerator)
        project = ProjectConfiguration(**{**project, **config.project_kwargs})
        project.automatic_checkpoint_naming = False  # save_checkpoint names them
        settings = {"log_with": config.log_with, "project_config": project, **settings}
        with explain(f"accelerator_kwargs={config.accelerator_kwargs}: accelerate can't start"):
            self.accelerator = Accelerator(**{**settings, **config.accelerator_kwargs})
        prepare_gradients(self.accelerator)
        self.own_checkpoints = []
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

    def data_order(self):
        """Return what the order of the data depends on, the number of ranks and rows included."""
        return data_order(self.config, world_size=self.accelerator.num_processes,
                          **identify(self.dataset))

    def state_dict(self):
        """Return the lines that a resumed run keeps of its files, and the order of the data."""
        return {"lines": count_lines(self.output_dir), "order": self.data_order()}

    def load_state_dict(self, state):
        """Take over the lines of a checkpoint; warn if the order of the data is another."""
        self.lines, self.saved_order = state["lines"], state["order"]
        warn_of_other_order(self.saved_order, self.data_order())

    def push_to_hub(self, repo_id, commit_message="Upload model", **kwargs):
        """Upload what `save_pretrained` writes to the hub's `repo_id`. kwargs: private, token, ...

        Call it on the main rank; with FSDP, on every rank."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if self.accelerator.is_main_process:
                upload(folder, repo_id, commit_message, **kwargs)

    def _save_pretrained(self, save_directory):
        """Call `save_pretrained`: scripts written for TRL 0.7 use both names."""
        self.save_pretrained(save_directory)

    def save_checkpoint(self, folder, number):
        """Write folder/checkpoint-<number> and remove the oldest ones. Call on every rank."""
        with new_checkpoint(self.accelerator, folder, number, self.own_checkpoints,
                            self.keep_checkpoints) as aside:
            self.accelerator.save_state(str(aside), safe_serialization=False)

    def load_checkpoint(self, path):
        """Restore weights, optimizer, random state and `state_dict` of a checkpoint.

        The optimizer's settings stay the config's; a scheduler sets the learning rate. Raises
        InputError."""
        path = newest_checkpoint(path)
        kept = {"betas", "eps", "weight_decay"} | (set() if self.lr_scheduler else {"lr"})
        settings = [{name: group[name] for name in kept & group.keys()}
                    for group in self.optimizer.param_groups]
        with explain(f"checkpoint {path} can't be loaded; resume with the flags of its run"):
            # strict=False: layers in 8 bits save names that they do not load
            self.accelerator.load_state(str(path), strict=False)
            rank = self.accelerator.process_index
            if rank < int(self.saved_order["world_size"]):  # accelerate goes on without it
                zipfile.ZipFile(path / f"random_states_{rank}.pkl").close()
        self.own_checkpoints = checkpoints_up_to(path)
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
