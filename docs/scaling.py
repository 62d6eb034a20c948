"""Memory and time of larger models: the numbers of docs/scaling.md.

    python docs/scaling.py              the page's table of three models, by the formula
    python docs/scaling.py --check      peaks of small models on this machine, next to the formula
    python docs/scaling.py --growth     CPU seconds of a PPO update as its sizes grow, on this CPU
"""
import copy
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import machinery  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402

MODELS = {  # the shapes of Llama 3.2 1B, Llama 3.1 8B and 70B
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=8),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, num_key_value_heads=8),
}
CUDA = torch.cuda.is_available()
CHECKS = (  # what runs, number of ranks, width, layers, vocabulary
    ("sft", 1, 512, 8, 1024), ("sft", 1, 768, 12, 1024),
    ("ppo", 1, 512, 8, 1024), ("ppo", 1, 768, 12, 1024),
    ("ppo bf16", 1, 512, 8, 1024), ("ppo bf16", 1, 768, 12, 1024),
    ("ppo bf16 lora", 1, 768, 12, 1024), ("ppo bf16 lora", 1, 1024, 16, 1024),
    ("sft bf16", 2, 768, 12, 1024), ("ppo bf16", 2, 768, 12, 1024),
    ("sft bf16 fsdp", 2, 768, 12, 1024), ("sft bf16 fsdp", 2, 512, 8, 32000),
    ("ppo bf16 fsdp", 2, 768, 12, 1024), ("ppo bf16 lora fsdp", 2, 1024, 16, 1024),
)
LAYERS = "LlamaDecoderLayer"
SHARD_PPO = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
             "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
             "FSDP_TRANSFORMER_CLS_TO_WRAP": LAYERS, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
SHARD_TRAINER = {"fsdp": "full_shard", "fsdp_config": {"transformer_layer_cls_to_wrap": [LAYERS]}}
LORA = machinery.lora_config(SimpleNamespace(lora_r=16, lora_alpha=16))


# ----------------------------------------------------------------------------- the formula
def count(config):
    """Count weights and bytes of a model on the meta device, which takes no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    reference = copy.deepcopy(model)
    machinery.halve_matrices(reference)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    P = sum(p.numel() for p in model.parameters())
    ends = P - block * config.num_hidden_layers  # embeddings and output layer
    # the largest unit of FSDP: its gradients are there in bfloat16, and in float32 to be summed
    largest = max(block, config.vocab_size * config.hidden_size)
    R = sum(p.numel() * p.element_size() for p in reference.parameters())
    adapter = common.with_adapter(model, LORA)
    A = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    return SimpleNamespace(P=P, A=A, R=R, gathered=2 * (2 * block + ends), largest=largest,
                           reduced=6 * largest + 4 * block)


def weights(n, ranks=1, sharded=False, lora=False, reference=True, ppo=False, bf16=True):
    """Return the bytes of weights, gradients and moments per GPU. sharded: by FSDP 2."""
    frozen = 2 * n.P if lora else 0
    trained = n.A if lora else n.P
    ref = (4 * n.A if lora else n.R if bf16 else 4 * n.P) * reference
    if not sharded:  # DDP holds all gradients while the copies in bfloat16 are there
        return frozen + 16 * trained + ref + 2 * trained * (bf16 and ranks > 1)
    total = (frozen + 16 * trained + ref) / ranks
    learning = total + (n.gathered if lora else n.reduced)
    if not ppo:
        return learning
    # no gradients, but whole, in bfloat16: the policy, and the reference that is no adapter
    scoring = total - 4 * trained / ranks + (2 if lora else 4) * n.P
    return max(learning, scoring)


def per_token(config, size=4):
    """Return the bytes per token of activations (checkpointed), logits, and keys and values.

    size: bytes per activation: 4, but 2 with LoRA or FSDP 2, whose weights are in bfloat16."""
    head = config.hidden_size // config.num_attention_heads
    values = config.num_hidden_layers * config.num_key_value_heads * head
    return SimpleNamespace(activations=size * config.num_hidden_layers * config.hidden_size,
                           logits=12 * config.vocab_size, cache=2 * size * values)


def column(config):
    """Yield the page's rows for one model: what it is, and its number."""
    n, whole, half = count(config), per_token(config), per_token(config, 2)
    yield "parameters P", f"{n.P:,}"
    yield "adapter A (`--lora-r 16`)", f"{n.A:,}"
    yield "logits of 8 responses of 128 tokens", gb(8 * 128 * whole.logits)
    for token, title in ((whole, "float32"), (half, "bfloat16")):
        yield f"activations of 8 rows of 640 tokens, {title}", gb(8 * 640 * token.activations)
        yield f"keys and values of 64 rows of 640 tokens, {title}", gb(64 * 640 * token.cache)
    yield "PPO's reward model of this size, float32", gb(4 * n.P)
    yield "**all weights**: SFT, reward, one GPU", gb(weights(n, reference=False))
    yield "SFT, reward, whole on several ranks", gb(weights(n, 2, reference=False))
    yield "DPO, PPO, one GPU", gb(weights(n))
    yield "DPO, PPO, whole on several ranks", gb(weights(n, 2))
    for lora in (False, True):
        if lora:
            yield "**LoRA**: every file, one GPU", gb(weights(n, lora=True))
        for ranks in (8, 32):
            yield f"DPO, FSDP 2, {ranks} ranks", gb(weights(n, ranks, True, lora))
            yield f"PPO, FSDP 2, {ranks} ranks", gb(weights(n, ranks, True, lora, ppo=True))
    for size, title in ((4, "SFT, reward"), (8, "DPO, PPO"), (2, "LoRA")):
        host = "**host memory** of 8 ranks" if size == 4 else "host memory of 8 ranks"
        yield f"{host}: {title}", gb(8 * size * n.P)


def gb(size):
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def table():
    """Return the page's table of three models."""
    columns = [list(column(LlamaConfig(vocab_size=128256, **shape))) for shape in MODELS.values()]
    lines = [["", *MODELS], ["---"] * (1 + len(MODELS))]
    for rows in zip(*columns, strict=True):
        lines.append([rows[0][0], *(number for _, number in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ----------------------------------------------------------------------------- its check
def llama(width, layers, vocabulary=1024):
    return LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
                       num_hidden_layers=layers, num_attention_heads=8)


def train(kind, config, batch_size=4, tokens=16, updates=3):
    """Train a random model: kind is sft or ppo, then any of bf16, lora and fsdp.

    Yield after each sampling and each update of PPO."""
    kinds = kind.split()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "model")
    dtype = torch.bfloat16 if "lora" in kinds else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    prompts = [torch.arange(5, 5 + tokens)] * batch_size
    if "sft" in kinds:
        rows = Dataset.from_list([{"input_ids": [5] * 2 * tokens}] * 2 * batch_size)
        shards = SHARD_TRAINER if "fsdp" in kinds else {}
        with tempfile.TemporaryDirectory() as folder:
            args = sft.SFTConfig(folder, max_steps=updates, save_strategy="no", eval_strategy="no",
                                 per_device_train_batch_size=batch_size, learning_rate=1e-5,
                                 bf16="bf16" in kinds, use_cpu=not CUDA, disable_tqdm=True,
                                 **shards)
            trainer = sft.SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
            del model  # shards replace it
            trainer.train()
        return
    if "fsdp" in kinds:
        os.environ.update(SHARD_PPO)
    lora = LORA if "lora" in kinds else None
    model = common.AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=lora)
    settings = ppo.PPOConfig(batch_size=batch_size, mini_batch_size=4, ppo_epochs=1,
                             bf16="bf16" in kinds, use_cpu=not CUDA)
    trainer = ppo.PPOTrainer(settings, model, tokenizer=tokenizer)
    del model
    for _ in range(updates):
        responses = trainer.generate(prompts, batch_size=batch_size, return_prompt=False,
                                     do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens)
        yield
        trainer.step(prompts, responses, list(torch.randn(batch_size).unbind()))
        yield


def shard_on_a_cpu():
    """Let accelerate shard on CPUs, which it does on GPUs only: say that these ranks are GPUs."""
    begin = Accelerator.__init__

    def begin_on_shards(self, *args, **kwargs):
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    Accelerator.__init__ = begin_on_shards


def resident(name):
    """Return this process's memory in bytes: VmRSS, now, or VmHWM, its peak."""
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak(kind, *sizes):
    """Return the bytes that training takes in this process, at its peak."""
    machinery.keep_freed_memory = lambda: None
    machinery.setup_ranks()
    if "fsdp" in kind and not CUDA:
        shard_on_a_cpu()
    list(train(kind, llama(64, 1)))  # what libraries load when they are first used
    AcceleratorState._reset_state()
    GradientState._reset_state()
    gc.collect()
    malloc = ctypes.CDLL(None)
    malloc.mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    malloc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    list(train(kind, llama(*sizes)))
    if CUDA:
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def check():
    """Print formula and measured peak of small models."""
    for kind, ranks, *sizes in CHECKS:
        if CUDA and ranks > torch.cuda.device_count():
            continue
        n = count(llama(*sizes))
        if not CUDA:  # gloo sums gradients in a copy
            n.reduced += 4 * n.largest
        formula = weights(n, ranks, "fsdp" in kind, lora="lora" in kind, ppo="ppo" in kind,
                          reference="ppo" in kind, bf16="bf16" in kind)
        measured = float(in_a_process("--peak", kind, *sizes, ranks=ranks))
        print(f"| {kind} | {ranks} | {n.P:,} | {formula / 1e6:.0f} | {measured / 1e6:.0f} | "
              f"{measured / formula:.2f} |", flush=True)


# ----------------------------------------------------------------------------- how time grows
SIZES = {"width": (64, 128, 256), "batch": (8, 16, 32), "ranks": (1, 2),
         "tokens": (16, 32, 64)}  # of a prompt, and of its response


def seconds(width, batch, tokens, ranks):
    """Return the CPU seconds that this rank takes to sample its part of an update, and to learn."""
    steps = train("ppo", llama(width, 4), batch // ranks, tokens, updates=3)
    laps = np.diff([time.process_time() for _ in steps])
    return min(laps[1::2]), min(laps[2::2])  # but for the first, which loads libraries


def growth():
    """Print CPU seconds as one size grows, and the exponent p of the fit seconds = c size^p."""
    for name, values in SIZES.items():
        points = []
        for value in values:
            sizes = {"width": 128, "batch": 16, "tokens": 32, "ranks": 1, name: value}
            if sizes["ranks"] == 1:
                points.append(seconds(**sizes))
            else:
                words = in_a_process("--seconds", *sizes.values(), ranks=sizes["ranks"])
                points.append([float(word) for word in words.split()])
        exponents = np.polyfit(np.log(values), np.log(points), 1)[0]
        for part, column, exponent in zip(("sample", "learn"), np.transpose(points), exponents,
                                          strict=True):
            numbers = ", ".join(f"{number:.2f}" for number in column)
            print(f"| {name} {values} | {part} | {numbers} | {exponent:.2f} |", flush=True)


def in_a_process(*words, ranks=1):
    """Run this script again; return the last line that it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), __file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(f"{peak(sys.argv[2], *map(int, sys.argv[3:]))}\n", end="")  # ranks print at once
    elif sys.argv[1:2] == ["--seconds"]:
        print(*seconds(*map(int, sys.argv[2:])))
    elif sys.argv[1:] == ["--check"]:
        check()
    elif sys.argv[1:] == ["--growth"]:
        growth()
    else:
        print(table())
