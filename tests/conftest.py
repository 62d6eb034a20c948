"""What the tests share: no network, no GPU, one thread; tiny models, tokenizers and batches."""

import os
import sys
import tempfile
from pathlib import Path

# the libraries' caches: none of the user's is read or written
HOME = tempfile.TemporaryDirectory(prefix="hf_home_")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=HOME.name,
    ACCELERATE_USE_CPU="true",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import common  # noqa: E402
import ppo  # noqa: E402

torch.set_num_threads(1)
PAD, BOS, EOS, VOCAB = 0, 1, 2, 100
CAUSAL, SEQ2SEQ = ("gpt2", "llama", "qwen3", "gemma", "mistral"), ("t5", "bart")
ROWS = ((3, 4), (6, 2), (2, 5), (4, 3))  # lengths of query and response


def pytest_configure(config):
    for noise in ("no dataset", ".*holds no value head", ".*gradient_checkpointing"):
        config.addinivalue_line("filterwarnings", f"ignore:{noise}")


@pytest.fixture(autouse=True)
def clean_slate():
    """accelerate keeps its state in the process: each test begins without it, with a known seed."""
    environment = dict(os.environ)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state(*[True] * (state is AcceleratorState))
    torch.set_grad_enabled(True)
    common.set_seed(0)
    yield
    os.environ.clear()
    os.environ.update(environment)


def hf_model(arch, seed=0, **changes):
    """A random language model of 2 layers of 32 (BART: 1), vocabulary 100, with its usual dropout,
    and weights large enough for its responses to differ."""
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "attention_dropout": 0.1,
    }
    config = {
        "gpt2": (
            "GPT2",
            {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
        ),
        "llama": ("Llama", llama),
        "qwen3": ("Qwen3", llama),
        "gemma": ("Gemma", llama),
        "mistral": ("Mistral", {**llama, "sliding_window": 32}),
        "t5": (
            "T5",
            {
                "d_model": 32,
                "d_kv": 16,
                "d_ff": 64,
                "num_layers": 2,
                "num_heads": 2,
                "decoder_start_token_id": PAD,
            },
        ),
        "bart": (
            "Bart",
            {
                "d_model": 32,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64,
                "init_std": 0.2,
                "max_position_embeddings": 64,
                "decoder_start_token_id": EOS,
                "forced_eos_token_id": None,
            },
        ),
    }
    name, sizes = config[arch]
    head = (
        "ForConditionalGeneration"
        if arch in SEQ2SEQ
        else "LMHeadModel"
        if arch == "gpt2"
        else "ForCausalLM"
    )
    torch.manual_seed(seed)
    return getattr(transformers, name + head)(
        getattr(transformers, name + "Config")(**{**tokens, **sizes, **changes})
    )


def gemma3(kind="ForConditionalGeneration", **changes):
    """A Gemma 3 with a vision tower, as in its 4B size: 2 text layers of 32, 1 vision layer."""
    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
            "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision,
                                       mm_tokens_per_image=4, **changes)
    torch.manual_seed(0)
    return getattr(transformers, "Gemma3" + kind)(config)


@pytest.fixture
def make_hf_model():
    return hf_model


@pytest.fixture
def make_model():
    """make_model("gpt2", seed=0, lora=None or "fresh" or "trained", **changes of the config) -> a
    model with a value head that is not zero."""
    def make(arch="gpt2", seed=0, lora=None, **changes):
        kind = "Seq2Seq" if arch in SEQ2SEQ else "Causal"
        auto, config = getattr(common, f"AutoModelFor{kind}LMWithValueHead"), None
        if lora:
            from peft import LoraConfig

            config = LoraConfig(
                r=4,
                lora_alpha=8,
                lora_dropout=0.3,
                init_lora_weights=lora == "fresh",
                target_modules="all-linear",
                fan_in_fan_out=arch == "gpt2",
                task_type="SEQ_2_SEQ_LM" if arch in SEQ2SEQ else "CAUSAL_LM",
            )
        model = auto.from_pretrained(hf_model(arch, seed, **changes), peft_config=config)
        torch.nn.init.normal_(model.v_head.summary.weight, std=0.3)
        torch.nn.init.constant_(model.v_head.summary.bias, 0.1)
        return model

    return make


@pytest.fixture
def make_tokenizer():
    """make_tokenizer(**attributes) -> 100 words: <pad> 0, <s> 1, </s> 2, <unk> 3, w4 to w99."""

    def make(**attributes):
        words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, VOCAB)]
        core = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        )
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, **{"model_max_length": 64, **special, **attributes})

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def make_batch():
    """make_batch(lengths of (query, response), start=None) -> queries, responses, scores for
    `step`. start: an encoder-decoder's start token, put before each response and not counted."""
    def make(lengths=ROWS, seed=0, start=None):
        draw = torch.Generator().manual_seed(seed)
        def tokens(n):
            return torch.randint(4, VOCAB, (n,), generator=draw)
        first = [] if start is None else [start]
        pairs = [(tokens(q), torch.tensor(first + tokens(r).tolist())) for q, r in lengths]
        queries, responses = zip(*pairs, strict=True)
        scores = torch.randn(len(lengths), generator=draw).unbind()
        return list(queries), list(responses), list(scores)

    return make


@pytest.fixture
def make_trainer(make_model, tokenizer):
    """make_trainer("gpt2" or a model, **parts of PPOTrainer or PPOConfig) -> PPOTrainer. By default
    a batch of 4 rows in one minibatch, one epoch, learning rate 1e-3."""
    def make(model="gpt2", **kwargs):
        names = (
            "ref_model",
            "tokenizer",
            "dataset",
            "optimizer",
            "data_collator",
            "num_shared_layers",
            "lr_scheduler",
        )
        parts = {name: kwargs.pop(name) for name in names if name in kwargs}
        sizes = {"batch_size": 4, "ppo_epochs": 1, "learning_rate": 1e-3}
        sizes["mini_batch_size"] = kwargs.get("forward_batch_size") or kwargs.get("batch_size", 4)
        config = ppo.PPOConfig(**{**sizes, **kwargs})
        model = make_model(model) if isinstance(model, str) else model
        return ppo.PPOTrainer(config, model, **{"tokenizer": tokenizer, **parts})

    return make


@pytest.fixture
def weights():
    """weights(model) -> {name: a copy}, to compare with later."""
    return lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def moved():
    """moved(before, model) -> names of the parameters that are no longer what they were."""
    return lambda before, model: {
        name for name, p in model.named_parameters() if not torch.equal(before[name], p)
    }
