"""docs/trl.py and docs/from_trl.md: scripts that were written for TRL 0.7.

    python -m pytest -q tests/test_from_trl.py
"""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hf_model
from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''
import json
import sys

import torch
from transformers import AutoTokenizer

import common
from trl import PPOConfig, PPOTrainer, AutoModelForCausalLMWithValueHead, create_reference_model
from trl.core import LengthSampler, respond_to_batch
from trl.import_utils import is_peft_available
import trl.trainer.utils as utils

model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
model_ref = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.eos_token
ppo_trainer = PPOTrainer(PPOConfig(batch_size=1, mini_batch_size=1), model, model_ref, tokenizer)
query_tensor = tokenizer.encode("this film", return_tensors="pt")
response_tensor = respond_to_batch(model, query_tensor, txt_len=LengthSampler(6, 7)())
stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], [torch.tensor(1.0)])
print(json.dumps({
    "users_common": common.ANSWER, "utils": utils.__name__, "peft": is_peft_available(),
    "reward": float(stats["ppo/mean_scores"]), "kl": float(stats["objective/kl"]),
    "tokens": float(stats["tokens/responses_len_mean"]),
    "moved": not torch.equal(model.v_head.summary.bias, torch.zeros(1)),
}))
'''


@pytest.fixture(scope="module")
def trl():
    """docs/trl.py, as `import trl` finds it with docs/ on PYTHONPATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        patch.setattr(TrainingArguments, "__init__", TrainingArguments.__init__)
        yield importlib.import_module("trl")
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        del sys.modules[name]


def test_an_old_script_called_ppo_py_runs_next_to_a_common_py_of_its_own(tmp_path):
    (tmp_path / "ppo.py").write_text(SCRIPT)
    (tmp_path / "common.py").write_text("ANSWER = 42\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "docs")}
    command = [sys.executable, tmp_path / "ppo.py", ROOT / "toy" / "model"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "users_common": 42, "utils": "trl", "peft": True, "reward": 1, "kl": 0, "tokens": 6,
        "moved": True}


def test_the_projects_files_have_names_of_their_own(trl):
    import common
    assert trl.PPOTrainer.__module__ == "trl.ppo"
    assert sys.modules["common"] is common is not sys.modules["trl.common"]
    assert sys.modules["trl.ppo"].masked_mean is trl.masked_mean  # one common.py for all files
    assert sys.modules["trl.trainer.utils"].RunningMoments is trl.RunningMoments


def test_every_name_of_the_pages_import_table_exists(trl):
    rows = re.findall(r"^\| (`[\w`, ]+`) \| \[(\w+)\.py\]", page(), re.MULTILINE)
    files = [file for _, file in rows]
    assert files == ["common", "sft", "reward", "ppo", "dpo", "iterative_sft", "ddpo", "trl"]
    for names, file in rows:
        module = trl if file == "trl" else importlib.import_module(file)
        for name in re.findall(r"\w+", names):
            assert hasattr(module, name), f"{file}.py has no {name}"
            assert hasattr(trl, name), f"docs/trl.py has no {name}"


def page():
    return (ROOT / "docs" / "from_trl.md").read_text()


def test_training_arguments_take_the_names_of_transformers_4(trl, tmp_path):
    args = TrainingArguments(tmp_path, evaluation_strategy="steps", warmup_ratio=0.1, no_cuda=True,
                             group_by_length=True, eval_steps=3, per_device_train_batch_size=2)
    assert args.eval_strategy == "steps" and args.eval_steps == 3 and args.use_cpu
    assert args.warmup_steps == 0.1 and args.train_sampling_strategy == "group_by_length"
    assert args.per_device_train_batch_size == 2 and args.output_dir == str(tmp_path)
    assert TrainingArguments(tmp_path, use_cpu=True).eval_strategy == "no"
    args = TrainingArguments(tmp_path, include_inputs_for_metrics=True, use_cpu=True)
    assert args.include_for_metrics == ["inputs"]
    with pytest.raises(ValueError, match="jit_mode_eval=True: transformers 5 has removed it"):
        TrainingArguments(tmp_path, jit_mode_eval=True)


# ----------------------------------------------------------------------------- small functions
def test_a_length_sampler_excludes_its_maximum(trl):
    np.random.seed(0)
    sampler = trl.LengthSampler(2, 8)
    # the first numbers of TRL 0.7.10 with this seed
    assert [sampler() for _ in range(12)] == [6, 7, 2, 5, 5, 5, 3, 5, 7, 4, 6, 2]


def test_respond_to_batch_returns_responses_alone(trl):
    model = hf_model("gpt2").eval()
    queries = torch.tensor([[5, 6, 7], [9, 8, 7]])
    responses = trl.respond_to_batch(model, queries, txt_len=4, top_k=1)
    rows = queries
    for _ in range(4):  # top_k=1 is greedy
        rows = torch.cat([rows, model(rows).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(responses, rows[:, 3:])


@pytest.mark.parametrize("settings, kept", [({"top_k": 3}, 3), ({"top_p": 0.5}, 1), ({}, 4)])
def test_respond_to_batch_samples_from_what_top_k_and_top_p_keep(settings, kept, trl):
    def model(tokens):  # probabilities 0.6, 0.2, 0.15, 0.05 whatever was written
        return (torch.tensor([0.6, 0.2, 0.15, 0.05]).log().expand(*tokens.shape, 4),)

    torch.manual_seed(0)
    responses = trl.respond_to_batch(model, torch.zeros(64, 1, dtype=torch.long), 8, **settings)
    assert sorted(set(responses.flatten().tolist())) == list(range(kept))
    shares = [(responses == token).float().mean().item() for token in range(kept)]
    weights = np.array([0.6, 0.2, 0.15, 0.05][:kept])
    assert shares == pytest.approx(list(weights / weights.sum()), abs=0.08)


def test_the_numbers_of_the_small_functions(trl):
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert trl.flatten_dict(nested) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert trl.flatten_dict({"a": {"b": 1}}, sep=".") == {"a.b": 1}
    stacked = trl.stack_dicts([{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)},
                               {"a": torch.tensor([1.0]), "b": torch.tensor(4.0)}])
    assert stacked["a"].tolist() == [[1, 2], [1, trl.core.WANDB_PADDING]]
    assert stacked["b"].tolist() == [[3], [4]]
    row = torch.tensor([[1, 2]])
    assert trl.pad_to_size(row, 4).tolist() == [[1, 2, 50256, 50256]]
    assert trl.pad_to_size(row, 1, padding=0).tolist() == [[1]]
    assert trl.pad_to_length(row, 1, 0).tolist() == [[1, 2]]
    assert trl.pad_to_length(row, 2, 7, dim=0).tolist() == [[1, 2], [7, 7]]
    assert [part.tolist() for part in trl.listify_batch(torch.eye(2))] == [[1, 0], [0, 1]]
    scalars = trl.convert_to_scalar({"a": torch.tensor(1.5), "b": torch.ones(2), "c": 3})
    assert scalars["a"] == 1.5 and scalars["b"].tolist() == [1, 1] and scalars["c"] == 3
    arrays = trl.stats_to_np({"a": torch.tensor([1.5]).bfloat16(), "b": np.float32(2), "c": 3})
    assert arrays["a"].dtype == np.float32 and arrays["a"] == [1.5]
    assert arrays["b"] == 2 and arrays["c"] == 3 and type(arrays["c"]) is float
    limits = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 5.0])
    assert trl.clip_by_value(torch.tensor([-3.0, 7.0]), *limits).tolist() == [-1, 5]
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    assert trl.logprobs_from_logits(logits, torch.tensor([[0, 1]])).exp().tolist() == [[0.5, 0.5]]


def test_dropout_and_accuracy_of_trl_trainer_utils(trl):
    layer = torch.nn.Sequential(torch.nn.Dropout(0.3))
    trl.trainer.utils.disable_dropout_in_model(layer)
    assert layer[0].p == 0
    pairs = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    assert trl.compute_accuracy((pairs, None)) == {"accuracy": 0.75}


def test_the_device_cache_decorator_wraps_a_method(trl):
    class Trainer(trl.PPOTrainer):
        @trl.core.PPODecorators.empty_device_cache()
        def step(self, queries):
            return queries

    assert Trainer.step(None, 3) == 3


def test_setup_chat_format_makes_model_and_tokenizer_agree(trl):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "model")
    model, chat = trl.setup_chat_format(hf_model("gpt2"), tokenizer, resize_to_multiple_of=64)
    assert chat is tokenizer and len(model.get_input_embeddings().weight) % 64 == 0
    assert len(model.get_input_embeddings().weight) >= len(tokenizer) and len(tokenizer) > 0
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.eos_token_id,
            model.generation_config.eos_token_id, model.generation_config.pad_token_id}
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    with pytest.raises(ValueError, match="format=llama"):
        trl.setup_chat_format(model, tokenizer, format="llama")
