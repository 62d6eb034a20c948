"""Models as people bring them: kinds of adapters, parts that text does not reach, hub arguments.

    python -m pytest -q tests/test_models.py
"""
import functools
import json
import os
import warnings

import pytest
import torch
import transformers
from conftest import VOCAB, gemma3, hf_model
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
)

import chats
import common
import dpo
import iterative_sft
import machinery
import ppo
import reward
import sft
from common import TOY, AutoModelForCausalLMWithValueHead, InputError

IDS = torch.tensor([[5, 6, 7, 8]])
TEXTS = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(4, 12)]
PAIRS = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2} w5"}
         for i in range(4, 12)]


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
                         **changes})


def classifier(dtype=torch.float32):
    config = hf_model("llama").config
    config.num_labels = 1
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).to(dtype)


def arguments(kind, tmp_path, **changes):
    return kind(**{"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none",
                   "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3,
                   "save_strategy": "no", "disable_tqdm": True, **changes})


def make_trainer(kind, model, tokenizer, tmp_path, **parts):
    """The trainer of a text file, with the same model and eight rows."""
    if kind == "sft":
        return sft.SFTTrainer(model, arguments(TrainingArguments, tmp_path), tokenizer=tokenizer,
                              train_dataset=Dataset.from_list(TEXTS), dataset_text_field="text",
                              **parts)
    if kind == "dpo":
        return dpo.DPOTrainer(model, args=arguments(TrainingArguments, tmp_path),
                              train_dataset=Dataset.from_list(PAIRS), tokenizer=tokenizer, **parts)
    if kind == "iterative_sft":
        return iterative_sft.IterativeSFTTrainer(
            model, arguments(TrainingArguments, tmp_path), tokenizer, **parts)
    if kind == "reward":
        args = arguments(reward.RewardConfig, tmp_path, remove_unused_columns=False)
        return reward.RewardTrainer(model, args, train_dataset=Dataset.from_list(PAIRS),
                                    tokenizer=tokenizer, **parts)
    config = ppo.PPOConfig(batch_size=4, mini_batch_size=4)
    return ppo.PPOTrainer(
        config, AutoModelForCausalLMWithValueHead.from_pretrained(model), None, tokenizer, **parts)


FILES = ("sft", "dpo", "iterative_sft", "reward", "ppo")


# ---------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_copying_an_adapter_changes_neither_policy_nor_reference(init):
    """The base weights lost the adapter's factors a second time: 2.5 to 3.5 nats."""
    model = get_peft_model(hf_model("llama"), lora(init_lora_weights=init)).eval()
    before = model(IDS).logits
    common.copy_adapter(model)
    torch.testing.assert_close(model(IDS).logits, before)
    with common.active_adapter(model, "reference"):
        torch.testing.assert_close(model(IDS).logits, before)
    assert model.peft_config["default"].init_lora_weights == init


@pytest.mark.parametrize("config", [
    AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules=["q_proj"],
                  task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), lora(use_dora=True),
], ids=["AdaLoRA", "prefix tuning", "DoRA"])
def test_a_copied_adapter_is_frozen_whatever_its_kind(config):
    model = get_peft_model(hf_model("llama"), config).eval()
    before = model(IDS).logits
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    common.copy_adapter(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.add_(0.1 * torch.randn_like(p))
    assert not torch.allclose(model(IDS).logits, before, atol=1e-3)
    with common.active_adapter(model, "reference"):
        torch.testing.assert_close(model(IDS).logits, before)


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_the_reference_would_share_are_refused(kind, bias, tokenizer, tmp_path):
    model = get_peft_model(hf_model("gpt2"), lora(bias=bias, fan_in_fan_out=True))
    with pytest.raises(InputError, match=f"^bias='{bias}' .*; set bias='none', or give a ref"):
        make_trainer(kind, model, tokenizer, tmp_path)


@pytest.mark.parametrize("kind", FILES)
def test_an_adapter_that_was_loaded_for_use_alone_is_refused(kind, tokenizer, tmp_path):
    """The log looked alive, and no weight moved."""
    def base():
        return classifier() if kind == "reward" else hf_model("llama")

    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    get_peft_model(base(), lora(task_type=task)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    with pytest.raises(InputError, match="^model: none of its parameters .*is_trainable=True"):
        make_trainer(kind, model, tokenizer, tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    make_trainer(kind, model, tokenizer, tmp_path)


VIRTUAL = {"prompt": PromptTuningConfig, "p": PromptEncoderConfig, "prefix": PrefixTuningConfig}


def with_virtual_tokens(kind, task="CAUSAL_LM"):
    model = classifier() if task == "SEQ_CLS" else hf_model("llama")
    model = get_peft_model(model, VIRTUAL[kind](num_virtual_tokens=3, task_type=task)).eval()
    torch.nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
    return model


@pytest.mark.parametrize("kind", VIRTUAL)
def test_the_logits_selected_behind_virtual_tokens_are_those_of_each_row_alone(kind):
    """They were those of tokens three places earlier, or an IndexError."""
    model = with_virtual_tokens(kind)
    rows = [torch.randint(4, VOCAB, (n,)) for n in (4, 7, 5)]
    want = torch.cat([model(row[None]).logits[0, -len(row):] for row in rows])
    ids = pad_sequence(rows, True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True)
    with common.only_logits_of(model, mask.bool()):
        got = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "p"])
@pytest.mark.parametrize("trainer", ["ppo", "reward", "sampling"])
def test_virtual_tokens_are_refused_where_padding_would_change_the_numbers(
        kind, trainer, tokenizer, tmp_path):
    model = with_virtual_tokens(kind, "SEQ_CLS" if trainer == "reward" else "CAUSAL_LM")
    with pytest.raises(InputError, match="^peft_config=Prompt.*; use LoRA or prefix tuning"):
        if trainer == "sampling":
            chats.generate(model, [IDS[0], IDS[0, :2]], tokenizer)
        else:
            make_trainer(trainer, model, tokenizer, tmp_path)


def test_a_fresh_head_next_to_a_bfloat16_base_trains_in_float32(tokenizer, tmp_path):
    """In bfloat16 most of its weights did not move."""
    model = classifier(torch.bfloat16)
    trainer = make_trainer("reward", model, tokenizer, tmp_path, peft_config=lora())
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters()
               if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert any("score" in name for name in trained)
    trainer.args.learning_rate = 1e-6  # a step below bfloat16's rounding
    trainer.train()
    score = next(n for n in trained if "score" in n)
    moved = dict(trainer.model.named_parameters())[score] != trained[score]
    assert moved.float().mean() > 0.9
    weights = {p.dtype for n, p in trainer.model.named_parameters() if "q_proj.base" in n}
    assert weights == {torch.bfloat16}


@pytest.mark.parametrize("kind", FILES)
def test_weights_that_train_in_half_precision_are_warned_about(kind, tokenizer, tmp_path):
    for dtype, wanted in ((torch.bfloat16, 1), (torch.float32, 0)):
        model = classifier(dtype) if kind == "reward" else hf_model("llama").to(dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(kind, model, tokenizer, tmp_path)
        told = [w for w in caught if str(w.message).startswith("torch_dtype=bfloat16: ")]
        assert len(told) == wanted


def test_a_half_precision_base_of_an_adapter_is_not_warned_about(tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch_dtype")
        make_trainer("sft", hf_model("llama").to(torch.bfloat16), tokenizer, tmp_path,
                     peft_config=lora())


def test_a_head_on_a_language_model_s_adapter_reads_what_the_adapter_learned(tmp_path):
    """It was an AttributeError of PEFT's."""
    base = hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, lora(init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    got = reward.load_sequence_classifier(str(tmp_path / "adapter")).eval()
    assert got.config.num_labels == 1 and not hasattr(got, "peft_config")
    want = adapted.get_base_model().model(IDS).last_hidden_state
    torch.testing.assert_close(got.model(IDS).last_hidden_state, want, rtol=1e-4, atol=1e-4)


def test_reward_trains_on_the_adapter_that_sft_has_saved(tmp_path):
    common_flags = {"use_cpu": True, "max_steps": 1, "disable_tqdm": True, "lora_r": 2,
                    "save_strategy": "no", "per_device_train_batch_size": 4}
    sft.main(sft.SFTConfig(output_dir=str(tmp_path / "sft"), model_name=str(TOY / "model"),
                           dataset=str(TOY / "reviews_test.jsonl"), **common_flags))
    reward.main(reward.ScriptConfig(
        output_dir=str(tmp_path / "reward"), model_name=str(tmp_path / "sft"),
        dataset=str(TOY / "pairs_test.jsonl"), **common_flags))
    weights = load_file(tmp_path / "reward" / "adapter_model.safetensors")
    assert any("score" in name for name in weights)


def test_a_saved_adapter_opens_from_another_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_model("llama").save_pretrained("base")
    trainer = make_trainer("sft", AutoModelForCausalLM.from_pretrained("base"), tokenizer, tmp_path,
                           peft_config=lora(init_lora_weights=False))
    trainer.save_model("adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    monkeypatch.chdir("/")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(opened(IDS).logits, trainer.model.eval()(IDS).logits)


def test_sampling_leaves_the_generation_config_of_an_adapter_s_base_model(tokenizer):
    model = get_peft_model(hf_model("llama"), lora())
    base = model.get_base_model()
    model.generation_config.top_k = base.generation_config.top_k = 7
    chats.generate(model, [IDS[0]], tokenizer, do_sample=True, max_new_tokens=2)
    assert base.generation_config.top_k == model.generation_config.top_k == 7


def test_the_last_norm_of_opt_is_not_shared_with_the_reference():
    """It is declared before the layers, and was frozen with those below."""
    model = OPTForCausalLM(OPTConfig(
        vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32))
    common.create_reference_model(model, num_shared_layers=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.decoder.final_layer_norm.weight" in trained
    assert not any("embed" in name or "layers.0" in name for name in trained)
    assert any("layers.1" in name for name in trained)


# ---------------------------------------------------------------------------------- multimodal
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_what_text_does_not_reach_is_frozen_and_gets_no_adapter(
        kind, adapter, tokenizer, tmp_path):
    is_reward = kind == "reward"
    model = gemma3("ForSequenceClassification", num_labels=1) if is_reward else gemma3()
    if adapter:
        model = common.with_adapter(model, lora(task_type="SEQ_CLS" if is_reward else "CAUSAL_LM"))
    model = make_trainer(kind, model, tokenizer, tmp_path).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    outside = ("vision_tower", "multi_modal_projector")
    assert not any(part in name for name in trained for part in outside)
    lora_names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert bool(lora_names) == adapter
    assert not any(part in name for name in lora_names for part in outside)
    text = model.pretrained_model if kind == "ppo" else model
    text(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.sum().backward()
    rest = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert {name for name in rest if "v_head" not in name} == set()


def test_a_text_model_is_trained_as_a_whole():
    for arch in ("llama", "t5", "bart"):
        assert common.freeze_beyond_text(hf_model(arch)) == []


# ---------------------------------------------------------------------------------- loading
HUB = {"token": "hf_secret", "revision": "v2", "cache_dir": "/cache"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, folder): every file of the hub's `name` is looked up in folder.

    Returns what each look-up was asked: [(name, file, arguments), ...]."""
    import huggingface_hub
    import peft.config
    import peft.utils.save_and_load
    import transformers.utils.hub
    folders, asked = {}, []

    def cached_files(path_or_repo_id, filenames, **kwargs):
        if os.path.isdir(path_or_repo_id):
            return real(path_or_repo_id, filenames, **kwargs)
        asked.append((path_or_repo_id, tuple(filenames), kwargs))
        found = [os.path.join(folders[path_or_repo_id], file) for file in filenames]
        return [file for file in found if os.path.exists(file)] or None

    def snapshot_download(name, allow_patterns=None, **kwargs):
        asked.append((name, tuple(allow_patterns), kwargs))
        return folders[name]

    @functools.wraps(huggingface_hub.hf_hub_download)  # PEFT reads its signature
    def hf_hub_download(name, filename, **kwargs):
        asked.append((name, (filename,), kwargs))
        return os.path.join(folders[name], filename)

    def file_exists(name, filename, **kwargs):
        return os.path.exists(os.path.join(folders[name], filename))

    real = transformers.utils.hub.cached_files
    monkeypatch.setattr(transformers.utils.hub, "cached_files", cached_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for module in (peft.config, peft.utils.save_and_load):
        monkeypatch.setattr(module, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", file_exists)

    def add(name, folder):
        folders[name] = str(folder)
        return asked

    return add


def test_hub_arguments_reach_the_value_head_and_the_adapter(hub, tmp_path):
    """The head and the adapter were looked for in another revision, and without the token."""
    base = hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    saved = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora())
    torch.nn.init.normal_(saved.v_head.summary.weight)
    saved.save_pretrained(tmp_path / "adapter")
    asked = hub("someone/adapter", tmp_path / "adapter")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained("someone/adapter", **HUB)
    assert torch.equal(loaded.v_head.summary.weight, saved.v_head.summary.weight)
    files = {file for _, names, _ in asked for file in names}
    assert {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"} <= files
    for _, names, given in asked:
        assert {**given, **HUB} == given, names


def test_hub_arguments_reach_a_reward_adapter_without_the_model_s_revision(hub, tmp_path):
    model = get_peft_model(classifier(), lora(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "reward")
    asked = hub("someone/reward", tmp_path / "reward")
    hf_model("llama").save_pretrained(tmp_path / "base")
    AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path / "base", peft_config=lora(), reward_adapter="someone/reward", **HUB)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f for _, fs, _ in asked
                                                                    for f in fs}
    for _, names, given in asked:
        assert (given["token"], given["cache_dir"]) == ("hf_secret", "/cache"), names
        assert given.get("revision") is None


def test_the_base_model_of_an_adapter_has_a_revision_of_its_own(hub, tmp_path):
    hf_model("llama").save_pretrained(tmp_path / "base")
    asked = hub("someone/base", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained("someone/base", revision="base-v1")
    asked.clear()
    get_peft_model(base, lora(revision="base-v1")).save_pretrained(tmp_path / "adapter")
    hub("someone/adapter", tmp_path / "adapter")
    asked.clear()
    common.load_pretrained(AutoModelForCausalLM, "someone/adapter", True, **HUB)
    revisions = {(name, given["revision"]) for name, _, given in asked}
    assert revisions == {("someone/base", "base-v1"), ("someone/adapter", "v2")}


CONFIGS = {"sft": sft.SFTConfig, "dpo": dpo.DPOConfig, "reward": reward.ScriptConfig,
           "ppo": ppo.PPOConfig, "iterative_sft": iterative_sft.IterativeSFTConfig}


@pytest.mark.parametrize("kind", FILES)
def test_the_loading_flags_of_a_script_reach_all_that_it_loads(kind, tmp_path, monkeypatch):
    """The run ends where the model is loaded."""
    seen = []

    def model(name, *args, **kwargs):
        seen.append(("model", kwargs))
        raise RuntimeError("seen")

    def config(name, real=transformers.AutoConfig.from_pretrained, **kwargs):
        seen.append(("config", kwargs))
        return real(name, **kwargs)

    def tokenizer(name, real=AutoTokenizer.from_pretrained, **kwargs):
        seen.append(("tokenizer", kwargs))
        return real(name, **kwargs)

    for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto_class, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    flags = CONFIGS[kind](
        output_dir=str(tmp_path), model_name=str(TOY / "model"), torch_dtype="bfloat16",
        revision="v2", trust_remote_code=True, attn_implementation="eager")
    script = {"sft": sft, "dpo": dpo, "reward": reward, "ppo": ppo,
              "iterative_sft": iterative_sft}[kind]
    with pytest.raises(InputError, match="seen"):
        script.main(flags)
    files = {"revision": "v2", "trust_remote_code": True}
    assert {name for name, _ in seen} == {"tokenizer", "config", "model"}
    for name, given in seen:
        more = {"dtype": "bfloat16", "attn_implementation": "eager"} if name == "model" else {}
        assert {**given, **files, **more} == given


def test_dpo_loads_its_reference_with_the_flags_but_the_model_s_revision(
        tokenizer, tmp_path, monkeypatch):
    seen = []

    def load(auto_class, name, is_trainable, **kwargs):
        seen.append(kwargs)
        return hf_model("llama")

    monkeypatch.setattr(machinery, "load_pretrained", load)
    config = dpo.DPOConfig(
        output_dir=str(tmp_path), ref_model_name=str(TOY / "model"), revision="v2",
        attn_implementation="eager", use_cpu=True)
    dpo.DPOTrainer(hf_model("llama"), args=config, tokenizer=tokenizer,
                   train_dataset=Dataset.from_list(PAIRS))
    assert seen == [{"dtype": "float32", "attn_implementation": "eager", "revision": None}]


def test_the_attention_that_is_asked_for_is_the_model_s(hub, tmp_path):
    for attention in ("eager", "sdpa"):
        _, model = machinery.load_language_model(str(TOY / "model"), attn_implementation=attention)
        assert model.config._attn_implementation == attention


@pytest.mark.parametrize("legacy", [False, True], ids=["zip file", "old format"])
def test_a_value_head_is_read_from_a_bin_file_of_either_format(legacy, tmp_path):
    weights = {"v_head.summary.weight": torch.ones(1, 4), "other": torch.zeros(3)}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    head = common.read_value_head(str(tmp_path))
    assert set(head) == {"summary.weight"} and head["summary.weight"].sum() == 4
