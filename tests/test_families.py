"""The sweep: what each text file computes on padded rows is what the plain model computes row by
row, for every family of language models; or the family is refused in one sentence.

    PYTHONPATH=. python tests/test_families.py        prints the table of docs/models.md
"""
import copy
import sys
from functools import lru_cache

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LogitsProcessor,
    TrainingArguments,
)

import chats
import common
import machinery
import ppo
from common import InputError
from dpo import DPOTrainer
from iterative_sft import IterativeSFTTrainer
from reward import RewardConfig, RewardTrainer
from sft import ConstantLengthDataset, SFTTrainer

PAD, BOS, EOS, VOCAB = 0, 1, 2, 100
ROWS = [(2, 4), (3, 9), (6, 2), (9, 6)]  # tokens of prompt and answer

# ------------------------------------------------------------------------------- the families
SIZES = {
    "vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_chunk_size": 8}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
             "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {  # name: what its config has besides SIZES
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "bloom": {},
    "biogpt": {},
    "falcon": {},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "llama": {},
    "llama4_text": {"attention_chunk_size": 8, "no_rope_layers": [1, 0], "num_local_experts": 2,
                    "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
    "mistral": {"sliding_window": 4},
    "mixtral": {**EXPERTS, "router_jitter_noise": 0.5},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA_NET,
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 16},
    "gemma3": {},  # the multimodal wrapper, see `config_of`
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "num_hidden_layers": 3},
    "phi3": {},
    "phimoe": {**EXPERTS, "router_jitter_noise": 1.0},
    "olmo2": {},
    "granite": {"logits_scaling": 0.5, "residual_multiplier": 0.5},
    "granitemoehybrid": {**MAMBA, **EXPERTS, "shared_intermediate_size": 32,
                         "layer_types": ["mamba", "attention"]},
    "cohere2": {**WINDOW, "logit_scale": 1.0},
    "gpt_oss": {**WINDOW, **EXPERTS},
    "deepseek_v3": {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
                    "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 16, "num_key_value_heads": 2, "head_dim": 8},
    "smollm3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
              "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "nemotron_h": {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "ssm_state_size": 8,
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "glm4": {},
    "modernbert-decoder": {"local_attention": 8},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2,
           "decoder_start_token_id": PAD},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
             "decoder_start_token_id": EOS, "forced_eos_token_id": None},
}
PACKS = {  # the families whose packed documents do not see each other; all others are refused
    "gpt2", "gpt_neo", "gpt_neox", "llama", "llama4_text", "mistral", "mixtral", "qwen2", "qwen3",
    "qwen3_moe", "gemma2", "gemma3_text", "gemma3", "phi3", "phimoe", "olmo2", "granite", "cohere2",
    "deepseek_v3", "smollm3", "glm4", "modernbert-decoder"}
NOISY = {"phimoe"}  # draws experts at random in train mode, which PPO and DPO warn of
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
everywhere = pytest.mark.parametrize("precision", PRECISIONS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def config_of(family):
    sizes = {**SIZES, **FAMILIES[family]}
    if family == "falcon":
        del sizes["head_dim"]
    if family == "gemma3":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_attention_heads": 1, "image_size": 14, "patch_size": 7}
        return AutoConfig.for_model(
            family, text_config={**sizes, **FAMILIES["gemma3_text"]}, vision_config=vision,
            mm_tokens_per_image=1, image_token_index=99, boi_token_index=98, eoi_token_index=97)
    return AutoConfig.for_model(family, **sizes)


@lru_cache(None)
def first_model(family, precision, auto_class):
    torch.manual_seed(0)
    config = config_of(family)
    if auto_class is AutoModelForSequenceClassification:
        config.num_labels = 1
    model = auto_class.from_config(config, dtype=PRECISIONS[precision])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make(family, precision, auto_class=None):
    """Return a random model of two or three layers, without dropout."""
    if auto_class is None:
        seq2seq = config_of(family).is_encoder_decoder
        auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return copy.deepcopy(first_model(family, precision, auto_class))


# ------------------------------------------------------------------------- the plain computation
@lru_cache(None)
def rows(seq2seq=False):
    """Prompts and answers, ragged. An encoder-decoder's answer is what follows the start token."""
    draw = torch.Generator().manual_seed(0)
    pairs = [[torch.randint(4, 96, (n,), generator=draw) for n in lengths] for lengths in ROWS]
    return [(prompt, torch.cat([answer[:-1], torch.tensor([EOS])])) for prompt, answer in pairs]


def forward(model, prompt, answer, **kwargs):
    """Run the plain model over one row, without padding. Returns what predicts each answer token:
    logits [n, V] and, of a causal model or a decoder, the last hidden states [n, D]."""
    options = {"use_cache": False, "output_hidden_states": True}
    if model.config.is_encoder_decoder:
        start = torch.tensor([model.config.decoder_start_token_id])
        output = model(input_ids=prompt[None], **options,
                       decoder_input_ids=torch.cat([start, answer[:-1]])[None])
        return output.logits[0], output.decoder_hidden_states[-1][0]
    output = model(input_ids=torch.cat([prompt, answer])[None], **options)
    first = len(prompt) - 1
    return output.logits[0, first:-1], output.hidden_states[-1][0, first:-1]


def logprobs(model, pairs=None):
    """Compute the log-probability of each answer token, a list of tensors [n], row by row."""
    results = []
    for prompt, answer in pairs or rows():
        logits = forward(model, prompt, answer)[0].float().log_softmax(-1)
        results.append(logits.gather(1, answer[:, None])[:, 0])
    return results


def gradient(model, loss):
    """Return the gradient of a loss with respect to all weights, one vector; 0 of frozen ones."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    known = {id(p): g for p, g in zip(trained, gradients, strict=True) if g is not None}
    return torch.cat([known.get(id(p), torch.zeros_like(p)).flatten().float()
                      for p in model.parameters()])


def check(got, compute, model, difference_to=None):
    """Compare numbers with what `compute` gives for the plain model.

    In float32 to 1e-4. In bfloat16 to twice what bfloat16 itself changes in the plain model,
    or to one rounding (1/256).
    difference_to: numbers of the same arithmetic, which are wanted instead."""
    want = compute(model)
    size = want.abs().max()
    tolerance = 1e-4 * size.clamp(min=1e-2)
    if model.dtype == torch.bfloat16:
        exact = type(model)(model.config).float().eval()
        exact.load_state_dict(model.state_dict())
        tolerance = torch.maximum(2 * (want - compute(exact)).abs().max(), size / 256)
    error = (got - (want if difference_to is None else difference_to)).abs().max()
    assert error <= tolerance, f"{error:.2g}, allowed is {tolerance:.2g}"


def check_loss(trainer, batch, compute, model):
    """Compare a trainer's loss of a batch, and its gradient, with the plain model's."""
    common.disable_dropout(trainer.model)
    trainer.model.train(model.config.model_type not in NOISY)
    loss = trainer.compute_loss(trainer.model, batch)
    check(loss.detach(), lambda m: compute(m).detach(), model)
    check(gradient(trainer.model, loss), lambda m: gradient(m, compute(m)), model)


def check_trained_and_saved(trainer, batch, model):
    """Check a trainer of the mean NLL per token: its loss, its gradient, and what it saves."""
    check_loss(trainer, batch, mean_nll, model)
    folder = trainer.args.output_dir
    trainer.save_model(folder)
    check_saved(folder, model, auto_class_of(model), rows()[3][0][None])


def check_saved(folder, model, auto_class, ids):
    """Check that plain transformers opens what was saved, with the same logits."""
    saved = auto_class.from_pretrained(folder, dtype=model.dtype).eval()
    with torch.no_grad():
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        want = model.eval()(**inputs).logits
        rounding = 1e-5 if model.dtype == torch.float32 else 1 / 64
        torch.testing.assert_close(saved(**inputs).logits, want, rtol=rounding, atol=rounding)


def mean_nll(model):
    return -torch.cat(logprobs(model)).mean()


def auto_class_of(model):
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


def labeled(model):
    """Return the rows as token ids and labels."""
    if model.config.is_encoder_decoder:
        return [{"input_ids": prompt, "labels": answer} for prompt, answer in rows()]
    return [{"input_ids": torch.cat(pair), "labels": torch.cat([pair[0] * 0 - 100, pair[1]])}
            for pair in rows()]


@pytest.fixture
def quiet(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True}


# ------------------------------------------------------------------------------------- the files
@everywhere
@each_family
def test_sft(family, precision, quiet, tokenizer):
    model = make(family, precision)
    trainer = SFTTrainer(copy.deepcopy(model), TrainingArguments(**quiet), tokenizer=tokenizer,
                         train_dataset=labeled(model))
    check_trained_and_saved(trainer, trainer.data_collator(trainer.train_dataset), model)


@everywhere
@each_family
def test_iterative_sft(family, precision, quiet, tokenizer):
    model = make(family, precision)
    args = TrainingArguments(**quiet)
    trainer = IterativeSFTTrainer(copy.deepcopy(model), args, tokenizer)
    batch = trainer.make_batch([trainer.make_row(row, "a row") for row in labeled(model)])
    check_trained_and_saved(trainer, batch, model)


@everywhere
@each_family
def test_dpo(family, precision, quiet, tokenizer):
    """Chosen are the answers of the rows, rejected those of the next row."""
    model = make(family, precision)
    args = TrainingArguments(**quiet, per_device_train_batch_size=8)
    trainer = DPOTrainer(copy.deepcopy(model), args=args, tokenizer=tokenizer, beta=0.5)
    chosen = rows()
    rejected = [(chosen[i][0], chosen[(i + 1) % 4][1]) for i in range(4)]
    pairs = []
    for (prompt, good), (_, bad) in zip(chosen, rejected, strict=True):
        pair = {"prompt_input_ids": prompt, "prompt_attention_mask": torch.ones_like(prompt)}
        for name, answer in (("chosen", good), ("rejected", bad)):
            whole = torch.cat([prompt, answer])
            pair[f"{name}_labels"] = torch.cat([prompt * 0 - 100, answer])
            if model.config.is_encoder_decoder:
                pair[f"{name}_labels"] = answer
            else:
                pair[f"{name}_input_ids"] = whole
                pair[f"{name}_attention_mask"] = torch.ones_like(whole)
        pairs.append({k: v.tolist() for k, v in pair.items()})
    batch = trainer.data_collator(pairs)

    def answers(m):
        return torch.stack([row.sum() for row in logprobs(m, chosen + rejected)])

    def loss(m):
        c, r = answers(m).chunk(2)
        return -F.logsigmoid(0.5 * (c - c.detach() - r + r.detach())).mean()

    got = torch.cat(trainer.concatenated_forward(trainer.model, batch, answers_only=True)[:2])
    check(got.detach(), lambda m: answers(m).detach(), model)
    first, metrics = trainer.get_batch_loss_metrics(
        trainer.model.train(family not in NOISY), batch)
    # nothing has moved yet (T5's kernels differ with and without gradient)
    check(metrics["rewards/margins"], lambda m: answers(m).detach(), model, difference_to=0)
    if family in NOISY:
        with pytest.warns(UserWarning, match="experts chosen at random"):
            trainer.compute_loss(trainer.model.train(), batch)
    check(gradient(trainer.model, first), lambda m: gradient(m, loss(m)), model)


@everywhere
@each_family
def test_reward(family, precision, quiet, tokenizer):
    auto_class = AutoModelForSequenceClassification
    if type(config_of(family)) not in auto_class._model_mapping:
        pytest.skip("transformers has no sequence classifier of this family")
    model = make(family, precision, auto_class)
    args = RewardConfig(**quiet, gradient_checkpointing=False, remove_unused_columns=False)
    trainer = RewardTrainer(copy.deepcopy(model), args, tokenizer=tokenizer)
    chosen = [torch.cat(pair) for pair in rows()]
    rejected = [torch.cat([chosen[i][:2], rows()[(i + 1) % 4][1]]) for i in range(4)]
    batch = trainer.data_collator([
        {"input_ids_chosen": c, "attention_mask_chosen": torch.ones_like(c),
         "input_ids_rejected": r, "attention_mask_rejected": torch.ones_like(r)}
        for c, r in zip(chosen, rejected, strict=True)])

    def scores(m):
        return torch.cat([m(input_ids=text[None]).logits[:, 0].float()
                          for text in chosen + rejected])

    def loss(m):
        c, r = scores(m).chunk(2)
        return -F.logsigmoid(c - r).mean()

    got = torch.cat(trainer.score_pairs(trainer.model, batch))
    check(got.detach(), lambda m: scores(m).detach(), model)
    check_loss(trainer, batch, loss, model)
    trainer.save_model(quiet["output_dir"])
    check_saved(quiet["output_dir"], model, auto_class, chosen[3][None])


class Recorder(LogitsProcessor):
    """Keep the logits of each step of decoding."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores.clone())
        return scores


@everywhere
@each_family
def test_ppo(family, precision, tmp_path, tokenizer):
    model = make(family, precision)
    seq2seq = model.config.is_encoder_decoder
    kind = "Seq2Seq" if seq2seq else "Causal"
    wrapped = getattr(common, f"AutoModelFor{kind}LMWithValueHead").from_pretrained(
        copy.deepcopy(model))
    torch.nn.init.normal_(wrapped.v_head.summary.weight, std=0.3)
    config = ppo.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, learning_rate=0)
    trainer = ppo.PPOTrainer(config, wrapped, None, tokenizer)
    head = wrapped.v_head.summary
    start = torch.tensor([model.config.decoder_start_token_id] if seq2seq else [], dtype=int)

    # log-probabilities and values of the rows, and their gradient
    queries, answers = map(list, zip(*rows(), strict=True))
    responses = [torch.cat([start, answer]) for answer in answers]
    inputs = trainer.prepare_model_inputs(queries, responses)
    logps, _, values, mask = trainer.batched_forward_pass(
        trainer.model.train(family not in NOISY), queries, responses, inputs)

    def plain_values(m):
        hidden = [forward(m, *pair)[1].float() for pair in rows()]
        return torch.cat([(x @ head.weight.T + head.bias)[:, 0] for x in hidden])

    def both(m):
        return torch.cat([torch.cat(logprobs(m)), plain_values(m)])

    got = torch.cat([logps[mask > 0], values[mask > 0]])
    check(got.detach(), lambda m: both(m).detach(), model)
    weights = torch.linspace(-1, 1, len(got))
    check(gradient(wrapped.pretrained_model, got @ weights),
          lambda m: gradient(m, both(m) @ weights), model)

    # what step-by-step decoding of padded prompts draws from is what is scored
    responses, drawn = [], []
    for part in common.split(queries, 1 if family == "recurrent_gemma" else 4):
        recorder = Recorder()
        sampled = trainer.generate(part, return_prompt=False, do_sample=True, max_new_tokens=6,
                                   logits_processor=[recorder])
        for i, response in enumerate(sampled):
            tokens = response[len(start):]
            steps = torch.stack([step[i] for step in recorder.steps])[:len(tokens)]
            drawn.append(steps.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        responses += sampled
    pairs = [(q, r[len(start):]) for q, r in zip(queries, responses, strict=True)]
    check(torch.cat(drawn), lambda m: torch.cat(logprobs(m, pairs)).detach(), model)

    # before the first optimizer step the policy is its own reference, and its own old policy
    scores = [torch.tensor(float(i)) for i in range(4)]
    trainer.model.train()
    if family in NOISY:
        with pytest.warns(UserWarning, match="experts chosen at random"):
            stats = trainer.step(queries, responses, scores)
    else:
        stats = trainer.step(queries, responses, scores)
        ratio = torch.tensor(stats["ppo/policy/ratio"])
        check(ratio.log(), lambda m: torch.cat(logprobs(m, pairs)).detach(),
              model, difference_to=0)
    assert stats["objective/kl"] == 0

    trainer.save_pretrained(str(tmp_path))
    check_saved(tmp_path, model, auto_class_of(model), queries[3][None])


def test_a_state_that_reads_padding_is_given_none(tokenizer):
    """RecurrentGemma's decoding differs with padding: each prompt is answered alone."""
    model = make("recurrent_gemma", "float32")
    prompts, recorder = [prompt for prompt, _ in rows()], Recorder()
    responses = chats.generate(model, prompts, tokenizer, do_sample=True, max_new_tokens=6,
                               logits_processor=[recorder])
    drawn = torch.cat(recorder.steps).log_softmax(-1).gather(1, torch.cat(responses)[:, None])
    pairs = list(zip(prompts, responses, strict=True))
    check(drawn[:, 0], lambda m: torch.cat(logprobs(m, pairs)).detach(), model)


@each_family
def test_a_reference_with_matrices_in_bfloat16_is_the_policy_under_autocast(family):
    policy = make(family, "float32")
    reference = copy.deepcopy(policy)
    machinery.halve_matrices(reference)
    ids = torch.arange(3, 27).view(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if policy.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = reference(**inputs).logits, policy(**inputs).logits
    assert torch.equal(got, want)  # so the first KL is exactly 0
    assert any(p.dtype == torch.bfloat16 for p in reference.parameters())


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_are_refused_in_packed_rows(kind, quiet, tokenizer):
    config = peft.get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM",
                                   "num_virtual_tokens": 2})
    packed = ConstantLengthDataset(tokenizer, [{"input_ids": [5, 6, EOS]}], seq_length=3)
    with pytest.raises(InputError, match=f"packing: .*llama with {kind.lower()}"):
        SFTTrainer(make("llama", "float32"), TrainingArguments(**quiet), tokenizer=tokenizer,
                   train_dataset=packed, peft_config=config)


def test_prompts_leave_room_in_the_positions_of_text(tokenizer):
    """A multimodal config keeps them in its text part; an encoder's prompt has all positions."""
    room = {family: machinery.longest_prompt(make(family, "float32"), 5)
            for family in ("llama", "gemma3", "bart")}
    assert room == {"llama": 59, "gemma3": 59, "bart": 64}


def test_layers_that_are_not_found_are_asked_for():
    model = make("modernbert-decoder", "float32")
    with pytest.raises(ValueError, match="num_shared_layers=1: .*pattern"):
        common.create_reference_model(model, 1)
    assert common.create_reference_model(model, 1, pattern="model.layers.{layer}")


@everywhere
@each_family
def test_packing(family, precision, quiet, tokenizer):
    """Each document is a row of its own: loss and gradient are those of separate rows."""
    model = make(family, precision)
    documents = [torch.cat(pair) for pair in rows()]
    packed = ConstantLengthDataset(
        tokenizer, [{"input_ids": d.tolist()} for d in documents],
        seq_length=sum(map(len, documents)))

    def trainer():
        return SFTTrainer(copy.deepcopy(model), TrainingArguments(**quiet, max_steps=1),
                          tokenizer=tokenizer, train_dataset=packed)

    if family not in PACKS:
        with pytest.raises(InputError, match="packing: .*(sees the one before it|is an encoder)"):
            trainer()
        return

    def loss(m):
        return -torch.cat(logprobs(m, [(d[:1], d[1:]) for d in documents])).mean()

    trainer = trainer()
    check_loss(trainer, trainer.data_collator(list(packed)), loss, model)


# ------------------------------------------------------------------------------------- the table
FILES = ("sft", "packing", "reward", "dpo", "ppo", "iterative_sft")


class Outcomes(dict):
    """A pytest plugin: {"sft[gpt2-float32]": "passed", ...}."""

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped:
            self[report.nodeid.split("::test_")[-1]] = report.outcome


def cell(outcomes, file, family):
    """Describe the outcomes of a file and a family in all precisions."""
    found = {outcomes.get(f"{file}[{family}-{precision}]") for precision in PRECISIONS}
    if file == "packing" and found == {"passed"} and family not in PACKS:
        return "refused"
    if file in ("dpo", "ppo") and found == {"passed"} and family in NOISY:
        return "warned"
    names = {"passed": "exact", "skipped": "no classifier", "failed": "WRONG", None: ""}
    return " or ".join(sorted(names[outcome] for outcome in found))


if __name__ == "__main__":
    outcomes = Outcomes()
    pytest.main([__file__, "-q", "--disable-warnings", *sys.argv[1:]], plugins=[outcomes])
    print("| family |", " | ".join(FILES), "|\n|---|" + "---|" * len(FILES))
    for family in FAMILIES:
        print(f"| {family} |", " | ".join(cell(outcomes, file, family) for file in FILES), "|")
