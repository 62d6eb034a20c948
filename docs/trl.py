"""`trl` for scripts written for TRL 0.7: its names, from the files of this project.

    PYTHONPATH=docs python old_script.py

With this folder on PYTHONPATH, `from trl import ...`, `from trl.core import ...` and the other
imports of TRL 0.7.10 find the trainers one folder up, and the small functions below. The files are
loaded as `trl.ppo`, `trl.common` and so on: a script called ppo.py does not import itself, and a
module common.py next to it stays yours. docs/from_trl.md lists the differences.
"""
import importlib.util
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import is_npu_available, is_wandb_available, is_xpu_available  # noqa: F401
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TrainingArguments,
)
from transformers.utils import (
    is_bitsandbytes_available,  # noqa: F401
    is_peft_available,
    is_rich_available,  # noqa: F401
)

__version__ = "0.7.10"
WANDB_PADDING = -1
FOLDER = Path(__file__).resolve().parent.parent
NAMES = {  # files in the order in which they import each other, and TRL's names in them
    "common": "AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead ValueHead "
              "PreTrainedModelWrapper create_reference_model set_seed logprobs_from_logits "
              "entropy_from_logits masked_mean masked_var masked_whiten whiten",
    "chats": "",
    "machinery": "",
    "sft": "SFTConfig SFTTrainer ConstantLengthDataset DataCollatorForCompletionOnlyLM",
    "reward": "RewardConfig RewardTrainer RewardDataCollatorWithPadding compute_accuracy",
    "ppo": "PPOConfig PPOTrainer AdaptiveKLController FixedKLController RunningMoments",
    "dpo": "DPOConfig DPOTrainer DPODataCollatorWithPadding",
    "iterative_sft": "IterativeSFTConfig IterativeSFTTrainer",
    "ddpo": "DDPOConfig DDPOTrainer DDPOPipelineOutput DDPOSchedulerOutput PerPromptStatTracker "
            "DDPOStableDiffusionPipeline DefaultDDPOStableDiffusionPipeline",
}
MODULES = ["core", "import_utils", "models", "models.modeling_base", "models.modeling_sd_base",
           "models.modeling_value_head", "models.utils", "trainer", "trainer.ddpo_config",
           "trainer.ddpo_trainer", "trainer.dpo_trainer", "trainer.iterative_sft_trainer",
           "trainer.ppo_config", "trainer.ppo_trainer", "trainer.reward_config",
           "trainer.reward_trainer", "trainer.sft_trainer", "trainer.utils"]


# ------------------------------------------------------------------- the project's files
def load(name):
    """Load a file of the project as the module `trl.<name>`.

    While it loads, `import common` finds the project's; afterwards it finds the user's again."""
    spec = importlib.util.spec_from_file_location(f"trl.{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    ours = {file: sys.modules[f"trl.{file}"] for file in NAMES if f"trl.{file}" in sys.modules}
    users = {file: sys.modules[file] for file in ours if file in sys.modules}
    sys.modules.update(ours)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for file in ours:
            del sys.modules[file]
        sys.modules.update(users)
    return module


def is_diffusers_available():
    """Whether ddpo.py can be imported."""
    return importlib.util.find_spec("diffusers") is not None and is_peft_available()


# ------------------------------------------------------------------- trl.core
class LengthSampler:
    """Draw a length from min_value to max_value - 1, with NumPy's global random numbers."""

    def __init__(self, min_value, max_value):
        self.min_value, self.max_value = min_value, max_value

    def __call__(self):
        return np.random.randint(self.min_value, self.max_value)


@torch.no_grad()
def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """Sample txt_len tokens after queries [B, Q] of one length. Returns responses [B, txt_len].

    No token ends a response. PPOTrainer.generate pads prompts and stops at the end token."""
    warpers = LogitsProcessorList()
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    tokens = queries
    for _ in range(txt_len):
        logits = warpers(tokens, model(tokens)[0][:, -1])
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return tokens[:, queries.shape[1]:]


def listify_batch(tensor):
    """Split a tensor [B, ...] into a list of its B rows."""
    return list(tensor)


def flatten_dict(nested, sep="/"):
    """Flatten dicts in a dict: {"a": {"b": 1}} becomes {"a/b": 1}."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update((f"{key}{sep}{k}", v) for k, v in flatten_dict(value, sep).items())
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts):
    """Stack the flattened tensors of each key, padded with -1: a list of B dicts gives [B, N]."""
    return {key: pad_sequence([stats[key].flatten() for stats in stats_dicts],
                              batch_first=True, padding_value=WANDB_PADDING)
            for key in stats_dicts[0]}


def pad_to_length(tensor, length, pad_value, dim=-1):
    """Pad a tensor at its end along dim to a length; a longer one stays as it is."""
    shape = list(tensor.shape)
    shape[dim] = max(length - shape[dim], 0)
    return torch.cat([tensor, tensor.new_full(shape, pad_value)], dim=dim)


def pad_to_size(tensor, size, dim=1, padding=50256):
    """Pad or cut a tensor at its end along dim to a size; by default with GPT-2's end token."""
    return pad_to_length(tensor, size, padding, dim).narrow(dim, 0, size)


def convert_to_scalar(stats):
    """Replace tensors of one element by Python numbers."""
    return {key: value.item() if torch.is_tensor(value) and value.numel() == 1 else value
            for key, value in stats.items()}


def stats_to_np(stats_dict):
    """Replace tensors by NumPy arrays, and other numbers by floats."""
    stats = {}
    for key, value in stats_dict.items():
        if torch.is_tensor(value):
            value = value.detach().cpu()
            value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        stats[key] = float(value) if np.isscalar(value) else value
    return stats


def clip_by_value(x, tensor_min, tensor_max):
    """Clip x to numbers or tensors of its shape."""
    return torch.clamp(x, tensor_min, tensor_max)


class PPODecorators:
    """Decorators of methods of PPOTrainer."""
    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls):
        """Empty the device cache after the method if `optimize_device_cache` is set."""
        yield
        if cls.optimize_device_cache:
            torch.cuda.empty_cache()


# ------------------------------------------------------------------- trl.models
CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
          "{{ message['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def setup_chat_format(model, tokenizer, format="chatml", resize_to_multiple_of=None):
    """Give model and tokenizer the ChatML template and its tokens, in place; returns both."""
    if format != "chatml":
        raise ValueError(f"format={format}: the only chat format is chatml")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                                  "pad_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resize_to_multiple_of)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


# ------------------------------------------------------------------- the names
this = sys.modules[__name__]
for file, names in NAMES.items():
    if file != "ddpo" or is_diffusers_available():
        loaded = load(file)
        globals().update((name, getattr(loaded, name)) for name in names.split())
disable_dropout_in_model = sys.modules["trl.common"].disable_dropout
for module_name in MODULES:  # each module of TRL is this one: it has all names
    sys.modules[f"trl.{module_name}"] = this
    setattr(this, module_name.split(".")[-1], this)


# ------------------------------------------------------------------- transformers' arguments
machinery = sys.modules["trl.machinery"]


@dataclass
class Arguments(machinery.RetiredArguments, TrainingArguments):
    """Hold the fields of TrainingArguments, and those that transformers 5 has retired."""


def take_retired_names(init):
    """Make a constructor of TrainingArguments that takes retired names, as SFTConfig does."""
    def __init__(self, *args, **settings):
        if settings.keys() & machinery.RETIRED.keys():
            config = object.__new__(Arguments)
            vars(config).update({"include_for_metrics": [], **settings})  # no default on its class
            machinery.replace_retired(config)
            settings = {name: value for name, value in vars(config).items()
                        if name not in machinery.RETIRED}
        init(self, *args, **settings)
    return __init__


TrainingArguments.__init__ = take_retired_names(TrainingArguments.__init__)
