"""ppo.py, one claim a test. "P1" to "P39" are known defects of TRL 0.7.10's PPO: what names one would fail there.

    python -m pytest -q tests/test_ppo.py
"""
import json
import math
import sys

import accelerate
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

import ppo
from common import AutoModelForCausalLMWithValueHead, InputError, disable_dropout
from conftest import CAUSAL, EOS, PAD, ROWS, SEQ2SEQ, VOCAB

ARCHITECTURES = CAUSAL + SEQ2SEQ
START = {"t5": PAD, "bart": EOS}  # the decoder's start token
ones = lambda *shape: torch.ones(*shape)
scores_of = lambda *numbers: [torch.tensor(float(n)) for n in numbers]


def by_hand(model, query, response, temperature=1.0):
    """One row through the bare model, alone and unpadded -> log-softmax [R, V], log-probabilities [R], values [R]."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits, _, values = model(input_ids=query[None], decoder_input_ids=response[None])
            rows, labels = slice(0, len(response) - 1), response[1:]
        else:
            logits, _, values = model(input_ids=torch.cat([query, response])[None])
            rows, labels = slice(len(query) - 1, -1), response
    logp = (logits[0, rows] / temperature).log_softmax(-1)
    return logp, logp.gather(1, labels[:, None])[:, 0], values[0, rows]


def forward(trainer, queries, responses, inputs=None, masks=None):
    """The trainer's own forward pass -> log-probabilities, values, masks, all [B, R]."""
    inputs = inputs or trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, _, values, masks = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, response_masks=masks)
    return logprobs, values, masks


def gradient_norms(trainer):
    """A list that gets the length of the gradient at each optimizer step."""
    norms = []

    def note(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    trainer.optimizer.optimizer.register_step_pre_hook(note)
    return norms


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


class Say(LogitsProcessor):
    """The model says these tokens, whatever it thinks: alike in all rows, or (a tuple) one for each row."""

    def __init__(self, *tokens):
        self.tokens, self.width = tokens, None

    def __call__(self, input_ids, scores):
        self.width = self.width or input_ids.shape[1]
        said = torch.tensor(self.tokens[input_ids.shape[1] - self.width]).expand(len(scores))
        return torch.full_like(scores, -math.inf).scatter(1, said[:, None], 0.0)


def say(*tokens):
    return {"logits_processor": LogitsProcessorList([Say(*tokens)]), "max_new_tokens": len(tokens), "do_sample": False}


def heard(trainer, *tokens):
    """What is left of these tokens as an answer."""
    return trainer.generate([torch.tensor([5])], return_prompt=False, **say(*tokens))[0].tolist()


# ------------------------------------------------------------------------------------------------ the configuration
@pytest.mark.parametrize("script", ["/some/where/happy.py", "happy"])
def test_experiments_are_named_after_the_script(script, monkeypatch):
    """P37: 0.7.10 took three letters off whatever stood in argv."""
    monkeypatch.setattr(sys, "argv", [script])
    assert ppo.PPOConfig().exp_name == "happy"


def test_steps_are_samples_and_give_the_number_of_updates(make_trainer):
    """P37: steps did nothing."""
    assert ppo.PPOConfig(steps=100, batch_size=8).total_ppo_epochs == 13
    assert make_trainer(steps=9).config.total_ppo_epochs == 3


def test_sizes_are_products_of_sizes(make_trainer):
    c = make_trainer(batch_size=12, mini_batch_size=2, gradient_accumulation_steps=3).config
    assert (c.backward_batch_size, c.global_backward_batch_size, c.global_batch_size, c.world_size) == (6, 6, 12, 1)


@pytest.mark.parametrize("arch, lora, seq2seq", [("gpt2", None, False), ("gpt2", "fresh", False), ("t5", None, True)])
def test_what_the_model_is_is_known_at_run_time(make_trainer, make_model, arch, lora, seq2seq):
    c = make_trainer(make_model(arch, lora=lora)).config
    assert (c.is_encoder_decoder, c.is_peft_model) == (seq2seq, bool(lora))


def test_forward_batch_size_is_the_old_name_of_mini_batch_size():
    with pytest.warns(UserWarning, match="mini_batch_size"):
        assert ppo.PPOConfig(batch_size=8, forward_batch_size=4).backward_batch_size == 4


def test_optimize_cuda_cache_is_the_old_name_of_optimize_device_cache():
    """P20: it was read once, at import, so that it never did anything."""
    with pytest.warns(UserWarning, match="optimize_device_cache"):
        assert ppo.PPOConfig(optimize_cuda_cache=True).optimize_device_cache is True


@pytest.mark.parametrize("wrong, told", [
    ({"batch_size": 6, "mini_batch_size": 4}, "not a multiple"),
    ({"batch_size": 6, "mini_batch_size": 2, "gradient_accumulation_steps": 2}, "not a multiple"),
    ({"mini_batch_size": 0}, "mini_batch_size=0"), ({"steps": 0}, "steps=0"), ({"temperature": 0.0}, "temperature=0"),
    ({"compare_steps": 0}, "compare_steps"), ({"kl_penalty": "k3"}, "k3"),
    ({"push_to_hub_if_best_kwargs": {"private": True}}, "repo_id")])
def test_a_wrong_configuration_is_refused_by_name(wrong, told):
    with pytest.raises(ValueError, match=told):
        ppo.PPOConfig(**wrong)


def test_a_configuration_can_be_written_down():
    assert json.loads(json.dumps(ppo.PPOConfig(exp_name="a").to_dict()))["exp_name"] == "a"


@pytest.mark.parametrize("wished", [True, False])
def test_the_device_cache_is_emptied_where_wished(make_trainer, make_batch, monkeypatch, wished):
    trainer, calls = make_trainer(optimize_device_cache=wished), []
    monkeypatch.setattr(ppo, "clear_device_cache", lambda **kwargs: calls.append(1))
    trainer.step(*make_batch())
    assert len(calls) == wished


def test_accelerator_kwargs_reach_the_accelerator(make_trainer, make_batch):
    trainer = make_trainer(accelerator_kwargs={"mixed_precision": "bf16"})
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.step(*make_batch())
    stats = trainer.step(*make_batch())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())
    assert math.isfinite(stats["ppo/loss/total"]) and stats["objective/logprobs"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------ a step, on any model
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_moves_the_whole_policy_and_never_the_reference(arch, make_trainer, make_batch, weights, moved):
    trainer = make_trainer(arch)
    policy, reference = weights(trainer.model), weights(trainer.ref_model)
    trainer.step(*make_batch(start=START.get(arch)))
    still = set(policy) - moved(policy, trainer.model)
    assert all("k_proj.bias" in name for name in still)  # a bias of the keys has no gradient: the softmax takes it out
    assert not moved(reference, trainer.ref_model)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logprobs_and_values_are_the_model_s_own(arch, temperature, make_trainer, make_batch):
    trainer = make_trainer(arch, temperature=temperature)
    queries, responses, _ = make_batch(start=START.get(arch))
    logprobs, values, masks = forward(trainer, queries, responses)
    for i, (query, response) in enumerate(zip(queries, responses)):
        _, logprob, value = by_hand(trainer.model, query, response, temperature)
        torch.testing.assert_close(logprobs[i][masks[i] > 0], logprob, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[i][masks[i] > 0], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_ratio_is_one_until_the_first_optimizer_step(arch, make_trainer, make_batch):
    """P2, P32: the sanity check of every PPO run. Dropout, padding or temperature on one side alone would break it."""
    stats = make_trainer(arch, mini_batch_size=2, gradient_accumulation_steps=2, temperature=0.8).step(
        *make_batch(start=START.get(arch)))
    torch.testing.assert_close(stats["ppo/policy/ratio"], ones(14), atol=2e-6, rtol=0)
    assert stats["ppo/policy/approxkl"] < 1e-11 and stats["ppo/policy/clipfrac"] == 0


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "t5"])
def test_what_was_praised_becomes_likelier_and_what_was_blamed_less(arch, make_trainer, make_batch):
    trainer = make_trainer(arch, ppo_epochs=4)
    queries, responses, _ = make_batch(((3, 4), (3, 4), (3, 4), (3, 4)), start=START.get(arch))
    before = forward(trainer, queries, responses)[0].sum(1)
    trainer.step(queries, responses, scores_of(5, 5, -5, -5))
    change = forward(trainer, queries, responses)[0].sum(1) - before
    assert change[:2].mean() > 0.1 and change[2:].mean() < -0.1


def test_the_first_token_that_an_encoder_decoder_generates_is_trained(make_trainer, make_batch):
    """P16: the mask began at the second."""
    trainer = make_trainer("t5")
    queries, responses, scores = make_batch(((3, 6), (3, 1), (3, 1), (3, 1)), start=PAD)
    assert forward(trainer, queries, responses)[2].sum(1).tolist() == [6, 1, 1, 1]
    assert len(trainer.step(queries, responses, scores)["objective/logprobs"]) == 9


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_step_takes_any_number_of_rows(rows, make_trainer, make_batch):
    """P26: just batch_size rows were taken."""
    trainer = make_trainer(mini_batch_size=2)
    norms = gradient_norms(trainer)
    stats = trainer.step(*make_batch(ROWS[:1] * rows))
    assert len(stats["objective/kl_dist"]) == rows and len(norms) == math.ceil(rows / 2)


# ------------------------------------------------------------------------------------------------ the policy answers
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_that_are_answered_together_are_answered_as_alone(arch, make_trainer, make_batch):
    """P5: padding beside a longer query must not shift a row's positions."""
    trainer = make_trainer(arch)
    queries, _, _ = make_batch()
    together = trainer.generate(queries, return_prompt=False, do_sample=False, max_new_tokens=5)
    for query, answer in zip(queries, together):
        alone = trainer.model.generate(query[None], do_sample=False, max_new_tokens=5, pad_token_id=PAD)[0]
        assert answer.tolist() == (alone if arch in SEQ2SEQ else alone[len(query):]).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_answers_come_in_the_order_of_the_queries(batch_size, make_trainer, make_batch):
    trainer, (queries, _, _) = make_trainer(), make_batch()
    rows = trainer.generate(queries, batch_size=batch_size, do_sample=False, max_new_tokens=2)
    assert all(row[:len(query)].tolist() == query.tolist() and len(row) == len(query) + 2
               for row, query in zip(rows, queries))


@pytest.mark.parametrize("return_prompt", [True, False])
def test_one_query_gives_one_row(return_prompt, make_trainer):
    query = torch.tensor([5, 6, 7])
    answer = make_trainer().generate(query, return_prompt=return_prompt, do_sample=False, max_new_tokens=4)
    assert answer.shape == (1, 4 + 3 * return_prompt)


def test_the_length_sampler_is_asked_for_each_batch(make_trainer, make_batch):
    queries, _, _ = make_batch(((3, 1),) * 4)
    lengths = iter([2, 5])
    rows = make_trainer().generate(queries, length_sampler=lambda: next(lengths), batch_size=2, return_prompt=False,
                                   do_sample=False, eos_token_id=None)
    assert sorted(map(len, rows)) == [2, 2, 5, 5]


@pytest.mark.parametrize("lora", [None, "trained"])
def test_the_reference_answers_too_where_asked(lora, make_trainer, make_model, make_batch):
    trainer = make_trainer(make_model(lora=lora), ref_model=make_model(seed=7))
    queries, _, _ = make_batch()
    greedy = {"return_prompt": False, "do_sample": False, "max_new_tokens": 4}
    responses, references = trainer.generate(queries, generate_ref_response=True, **greedy)
    assert [row.tolist() for row in responses] == [row.tolist() for row in trainer.generate(queries, **greedy)]
    for query, row in zip(queries, references):
        alone = trainer.ref_model.generate(query[None], pad_token_id=PAD, **{**greedy, "return_prompt": None})[0]
        assert row.tolist() == alone[len(query):].tolist()


def test_the_reference_of_an_adapter_answers_as_the_policy_once_did(make_trainer, make_model, make_batch):
    trainer, (queries, responses, scores) = make_trainer(make_model(lora="trained"), learning_rate=0.03), make_batch()
    greedy = {"return_prompt": False, "do_sample": False, "max_new_tokens": 6}
    first = [row.tolist() for row in trainer.generate(queries, **greedy)]
    trainer.step(queries, responses, scores)
    policy, reference = trainer.generate(queries, generate_ref_response=True, **greedy)
    assert [row.tolist() for row in reference] == first != [row.tolist() for row in policy]
    assert trainer.model.pretrained_model.active_adapter == "default"


def test_an_answer_ends_after_its_own_end_not_at_one_in_the_query(make_trainer):
    """P14: prompt and answer were searched together."""
    query = torch.tensor([5, EOS, 6])
    (row,) = make_trainer().generate([query], **say(7, 8, EOS, 9))
    assert row.tolist() == [5, EOS, 6, 7, 8, EOS]


def test_a_tokenizer_whose_texts_begin_with_the_end_token_gets_its_answers(make_trainer, make_tokenizer):
    """P14: where bos is eos (GPT-2, OPT), an answer was one token long."""
    trainer = make_trainer(tokenizer=make_tokenizer(bos_token="</s>", pad_token="</s>"))
    query = torch.tensor([EOS, 5])
    assert trainer.generate([query], **say(7, 8, 9))[0].tolist() == [EOS, 5, 7, 8, 9]
    assert trainer.generate([query], return_prompt=False, **say(7, EOS, 9))[0].tolist() == [7, EOS]


def test_a_decoder_that_starts_with_the_end_token_goes_on(make_trainer):
    """P14: BART's decoder starts with </s>; every response was that one token."""
    assert make_trainer("bart").generate([torch.tensor([5, 6])], **say(7, 8, EOS, 9))[0].tolist() == [EOS, 7, 8, EOS]


def test_any_of_the_model_s_end_tokens_ends_an_answer(make_trainer):
    trainer = make_trainer()
    trainer.model.pretrained_model.generation_config.eos_token_id = [50, 51]
    for end in (50, 51, EOS):
        assert heard(trainer, 7, end, 9) == [7, end]


@pytest.mark.parametrize("given", [{}, {"pad_token_id": PAD}, {"pad_token_id": EOS}])
@pytest.mark.parametrize("end", [EOS, PAD])
def test_what_fills_a_row_after_its_end_is_no_part_of_the_answer(end, given, make_trainer):
    """Chat models often have two end tokens, and one of them is their padding."""
    trainer, queries = make_trainer(), [torch.tensor([5]), torch.tensor([6])]
    trainer.model.pretrained_model.generation_config.eos_token_id = [EOS, PAD]
    rows = trainer.generate(queries, return_prompt=False, **say(7, (end, 8), 9, EOS), **given)
    assert [row.tolist() for row in rows] == [[7, end], [7, 8, 9, EOS]]


def test_a_padding_token_that_is_no_end_token_ends_nothing(make_trainer):
    assert heard(make_trainer(), 7, PAD, 8) == [7, PAD, 8]


def test_without_an_end_token_answers_have_full_length(make_trainer, make_tokenizer):
    trainer = make_trainer(tokenizer=make_tokenizer(eos_token=None))
    trainer.model.pretrained_model.generation_config.eos_token_id = None
    assert heard(trainer, 7, EOS, 8) == [7, EOS, 8]


def test_a_failed_generation_leaves_everything_as_it_was(make_trainer):
    """P15: tokenizer.padding_side stayed "left" for the rest of the run."""
    trainer = make_trainer()
    trainer.model.train()
    with pytest.raises(Exception, match="nonsense"):
        trainer.generate([torch.tensor([5])], nonsense=1)
    assert trainer.tokenizer.padding_side == "right" and trainer.model.training


def test_scores_of_generation_are_refused(make_trainer):
    """P36: an unrelated error deep inside."""
    with pytest.raises(ValueError, match="tokens alone"):
        make_trainer().generate([torch.tensor([5])], return_dict_in_generate=True, output_scores=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_policy_that_answers_is_the_policy_that_is_scored(arch, make_trainer, make_batch):
    """P2: after the first step answers were sampled with dropout."""
    trainer = make_trainer(arch, learning_rate=1e-5)
    trainer.step(*make_batch(start=START.get(arch)))
    greedy = {"return_prompt": False, "do_sample": False, "max_new_tokens": 8}
    answers = {tuple(row.tolist()) for row in trainer.generate([torch.tensor([5, 6, 7])] * 8, **greedy)}
    assert len(answers) == 1
    logp, _, _ = by_hand(trainer.model, torch.tensor([5, 6, 7]), torch.tensor(*answers))  # greedy: always the likeliest
    assert logp.argmax(1).tolist() == list(*answers)[arch in SEQ2SEQ:]


def test_dropout_is_off_wherever_a_model_keeps_it(make_model):
    model = make_model(lora="fresh", resid_pdrop=0.5)
    disable_dropout(model.train())
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(tokens)[0], model(tokens)[0]) and model.training


# ------------------------------------------------------------------------------------------------ the sampler
def test_draw_token_draws_from_the_distribution_and_never_what_has_probability_zero():
    p = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.3, 0.4, 0.0])
    n = 40_000
    out = ppo.DrawToken()(None, p.log().expand(n, -1))
    assert (out.isfinite().sum(1) == 1).all() and (out.max(1).values == 0).all()
    share = out.argmax(1).bincount(minlength=7) / n
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("number, token", [(0.0, 1), (0.0999, 1), (0.1001, 2), (1 - 2**-24, 5)])
def test_draw_token_inverts_the_distribution_function_up_to_its_ends(number, token, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, number))
    p = torch.tensor([[0.0, 0.1, 0.2, 0.0, 0.3, 0.4, 0.0]])
    assert ppo.DrawToken()(None, p.log()).argmax() == token


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_and_scoring_have_one_temperature(temperature, make_trainer):
    """P32: log-probabilities were always those of temperature 1."""
    n, query = 8000, torch.tensor([5, 6, 7])
    trainer = make_trainer(temperature=temperature)
    rows = trainer.generate([query] * n, batch_size=n, return_prompt=False, do_sample=True, max_new_tokens=1)
    tokens = [torch.tensor([i]) for i in range(VOCAB)]
    p = forward(trainer, [query] * VOCAB, tokens)[0][:, 0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert ((torch.cat(rows).bincount(minlength=VOCAB) / n - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def sampled(trainer, **given):
    """300 samples of one token -> a list."""
    ppo.set_seed(0)
    rows = trainer.generate([torch.arange(4, 64)] * 300, batch_size=300, return_prompt=False, do_sample=True,
                            max_new_tokens=1, **given)
    return torch.cat(rows).tolist()


@pytest.mark.parametrize("given", [{"top_k": 2}, {"top_p": 0.3}, {"temperature": 0.2}, {"min_p": 0.9}, {"repetition_penalty": 1e3}])
def test_sampling_from_another_distribution_than_is_scored_is_told(given, make_trainer):
    """P32"""
    trainer = make_trainer(temperature=2.0)
    with pytest.warns(UserWarning, match="another policy"):
        tokens = sampled(trainer, **given)
    assert len(set(tokens)) < 0.8 * len(set(sampled(trainer)))


@pytest.mark.parametrize("own", [{"top_k": 1}, {"top_p": 0.01}, {"temperature": 0.01}, {"min_p": 0.9},
                                 {"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 2},
                                 {"min_new_tokens": 1}, {"suppress_tokens": [4, 5, 6]}, {"forced_eos_token_id": EOS}])
def test_the_model_s_own_sampling_settings_are_left_out(own, make_trainer):
    """P32: they belong to chats; a rollout samples from what is scored."""
    trainer = make_trainer()
    plain = sampled(trainer)
    trainer.model.pretrained_model.generation_config.update(**own)
    assert sampled(trainer) == plain


def test_generation_does_not_sample_unless_asked(make_trainer):
    rows = make_trainer(temperature=9.0).generate([torch.tensor([5])] * 20, batch_size=20, max_new_tokens=3)
    assert len({tuple(row.tolist()) for row in rows}) == 1


@pytest.mark.parametrize("given, told", [({"do_sample": True, "num_beams": 2}, "one sampled response"),
                                         ({"do_sample": True, "num_return_sequences": 2}, "one response for each query"),
                                         ({"num_beams": 2, "num_return_sequences": 2}, "one response for each query")])
def test_a_query_gets_one_answer_and_no_other_query_s(given, told, make_trainer):
    with pytest.raises(ValueError, match=told):
        make_trainer().generate([torch.tensor([5]), torch.tensor([6])], max_new_tokens=2, **given)


def test_an_end_token_ends_an_answer_though_it_pads_too(make_trainer, tokenizer):
    trainer = make_trainer()
    plain = trainer.generate([torch.tensor([5])], return_prompt=False, max_new_tokens=8)[0].tolist()
    end = plain[2]
    again, = trainer.generate([torch.tensor([5])], return_prompt=False, max_new_tokens=8, eos_token_id=[EOS, end], pad_token_id=end)
    assert again.tolist() == plain[:plain.index(end) + 1]
    rows = trainer.generate([torch.tensor([5]), torch.tensor([9])], return_prompt=False, max_new_tokens=8, eos_token_id=end,
                            pad_token_id=end)
    assert [len(row) for row in rows] == [8, 8]          # TRL 0.7's way to ask for responses of one length
    assert trainer.end_tokens([7, 8]) == {7, 8, tokenizer.eos_token_id} and trainer.end_tokens(None) == {tokenizer.eos_token_id}


def test_each_rank_draws_its_own_answers_from_the_same_weights(make_trainer, monkeypatch):
    """P6: the same prompt gave the same answer on every rank."""
    def answer(rank):
        monkeypatch.setattr(accelerate.Accelerator, "process_index", property(lambda self: rank))
        trainer = make_trainer()
        row = trainer.generate(torch.tensor([5]), do_sample=True, max_new_tokens=20)
        return row.tolist(), trainer.model.state_dict()

    (first, weights), (again, _), (other, others) = answer(0), answer(0), answer(1)
    assert first == again != other
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_seed_is_what_answers_and_shuffles_depend_on(make_trainer):
    def run(seed):
        trainer = make_trainer(seed=seed, dataset=[{"input_ids": [i]} for i in range(4, 24)])
        batch = next(iter(trainer.dataloader))["input_ids"]
        row = trainer.generate(torch.tensor([5]), do_sample=True, max_new_tokens=20)
        return [query.tolist() for query in batch], row.tolist()

    (order, answer), again, (other_order, other_answer) = run(3), run(3), run(4)
    assert (order, answer) == again and order != other_order and answer != other_answer


def test_deepspeed_is_refused_before_it_hangs(make_trainer, monkeypatch):
    """P34: generation from sharded weights hung, crashed or took ten times as long. (FSDP: tests/test_sharded.py.)"""
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", property(lambda self: DistributedType.DEEPSPEED))
    with pytest.raises(ValueError, match="DeepSpeed.*FSDP"):
        make_trainer()


def test_generation_never_goes_through_the_wrapped_model(make_trainer, make_batch):
    """P34: a model that is wrapped for many ranks is unwrapped once, for answers and for passes without gradient."""
    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            assert torch.is_grad_enabled()
            self.calls += 1
            return self.module(*args, **kwargs)

    trainer = make_trainer(mini_batch_size=2)
    trainer.model = Wrapped(trainer.model)
    queries, responses, scores = make_batch()
    trainer.generate(queries, do_sample=True, max_new_tokens=2, generate_ref_response=True)
    assert trainer.model.calls == 0
    trainer.step(queries, responses, scores)
    assert trainer.model.calls == 2  # the gradient's passes, where the wrapper adds up the ranks


# ------------------------------------------------------------------------------------------------ padding and masks
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_never_changes_a_row_s_numbers(arch, make_trainer, make_batch):
    trainer = make_trainer(arch)
    queries, responses, _ = make_batch(start=START.get(arch))
    logprobs, values, masks = forward(trainer, queries, responses)
    for i in range(len(queries)):
        alone = forward(trainer, queries[i:i + 1], responses[i:i + 1])
        for batched, single in zip((logprobs, values, masks), alone):
            torch.testing.assert_close(batched[i, :single.shape[1]], single[0], atol=1e-5, rtol=1e-5)
            assert not batched[i, single.shape[1]:].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_inputs_may_be_padded_on_the_left(arch, make_trainer, make_batch):
    """P5: positions were counted from the padding."""
    trainer = make_trainer(arch)
    queries, responses, _ = make_batch(start=START.get(arch))
    right, left = trainer.prepare_model_inputs(queries, responses), {}
    for name, rows in right.items():
        masks = right[name.replace("input_ids", "attention_mask")]
        left[name] = torch.stack([row.roll(int((mask == 0).sum())) for row, mask in zip(rows, masks)])
    assert (left["attention_mask"][:, -1] == 1).all() and (left["attention_mask"][:, 0] == 0).any()
    for a, b in zip(forward(trainer, queries, responses, left), forward(trainer, queries, responses, right)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masks", [None, [[1, 1, 0, 1], [0, 1], [1, 0, 0, 1, 1], [1, 1, 0]]])
def test_the_tokenizer_s_padding_side_changes_nothing(masks, make_trainer, make_tokenizer, make_batch):
    """P5, P8: left padding moved the numbers, and with response_masks it crashed."""
    results = []
    for side in ("right", "left"):
        trainer = make_trainer(tokenizer=make_tokenizer(padding_side=side), mini_batch_size=2)
        stats = trainer.step(*make_batch(), response_masks=masks and [torch.tensor(mask) for mask in masks])
        results.append((stats["ppo/loss/total"], *trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_padding_token_within_a_text_is_a_token(make_trainer, make_tokenizer):
    """Masks come from lengths: where pad is eos, as is usual for GPT-2, the end of an answer is trained."""
    trainer = make_trainer(tokenizer=make_tokenizer(pad_token="</s>"))
    queries = [torch.tensor([EOS, 5]), torch.tensor([6, 7, 8])]
    responses = [torch.tensor([9, EOS, 5, EOS]), torch.tensor([4])]
    logprobs, _, masks = forward(trainer, queries, responses)
    assert masks.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    torch.testing.assert_close(logprobs[0], by_hand(trainer.model, queries[0], responses[0])[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_the_size_of_a_forward_pass_changes_no_number(arch, make_trainer, make_batch, monkeypatch):
    trainer = make_trainer(arch)
    queries, responses, _ = make_batch(start=START.get(arch))
    at_once = forward(trainer, queries, responses)
    monkeypatch.setattr(ppo, "FORWARD_TOKENS", 1)
    for a, b in zip(at_once, forward(trainer, queries, responses)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_logits_are_given_where_asked_and_zero_where_there_is_no_token(make_trainer, make_batch):
    trainer = make_trainer()
    queries, responses, _ = make_batch()
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, logits, _, masks = trainer.batched_forward_pass(trainer.model, queries, responses, inputs, True)
        assert trainer.batched_forward_pass(trainer.model, queries, responses, inputs)[1] is None
    assert logits.shape == (4, 5, VOCAB) and not logits[masks == 0].any()
    labels = torch.nn.utils.rnn.pad_sequence(responses, True)
    torch.testing.assert_close(ppo.logprobs_from_logits(logits, labels) * masks, logprobs)


def test_masked_tokens_are_read_and_not_counted(make_trainer, make_batch):
    """A tool's answer within a response: the policy reads it and isn't blamed for it."""
    trainer = make_trainer()
    queries, responses, scores = make_batch(((3, 5), (3, 5), (3, 5), (3, 5)))
    masks = [torch.tensor([1, 0, 0, 1, 1])] * 4
    stats = trainer.step(queries, responses, scores, masks)
    logprobs, _, _ = forward(make_trainer(), queries, responses)
    torch.testing.assert_close(stats["objective/logprobs"], logprobs[:, [0, 3, 4]].flatten(), atol=1e-5, rtol=0)
    assert len(stats["ppo/policy/ratio"]) == 12
    assert stats["ppo/policy/entropy"].item() == pytest.approx(torch.stack(
        [ppo.entropy_from_logits(by_hand(make_trainer().model, q, r)[0])[[0, 3, 4]] for q, r in zip(queries, responses)]
    ).mean().item(), abs=1e-5)


def test_advantages_step_over_masked_tokens():
    """P7: all values 1 and a last reward of 1 make every return 1; through a gap they came out as 0.90."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    values, rewards = ones(1, 6), torch.tensor([[0., 0, 0, 0, 0, 1]])
    advantages, returns = ppo.gae(values, rewards, mask, gamma=1.0, lam=0.95)
    assert torch.equal(returns, mask.float()) and not advantages.any()


def test_a_row_with_a_gap_has_the_returns_of_the_row_without(make_trainer):
    """P7"""
    trainer = make_trainer(gamma=0.9, lam=0.7)
    values, rewards = torch.randn(2, 3, 6)
    kept = [0, 2, 5]
    mask = torch.zeros(3, 6).index_fill(1, torch.tensor(kept), 1)
    got = trainer.compute_advantages(values, rewards, mask)
    want = trainer.compute_advantages(values[:, kept], rewards[:, kept], ones(3, 3))
    for a, b in zip(got, want):
        torch.testing.assert_close(a[:, kept], b)
        assert not a[mask == 0].any()


@pytest.mark.parametrize("whiten_rewards", [True, False])
def test_padding_never_reaches_the_returns(whiten_rewards, make_trainer):
    """P9: whitened padding was no longer zero, and leaked into the tokens before it."""
    trainer = make_trainer(whiten_rewards=whiten_rewards)
    values, rewards, mask = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([[1., 1, 1], [1, 1, 0]])
    pad = lambda x, fill: torch.cat([x, torch.full((2, 2), fill)], 1)
    got = trainer.compute_advantages(pad(values, 7.0), pad(rewards, 0.0), pad(mask, 0.0))
    for a, b in zip(got, trainer.compute_advantages(values, rewards, mask)):
        torch.testing.assert_close(a, pad(b, 0.0))


def test_whitened_rewards_have_variance_one(make_trainer):
    """whiten_rewards: with lam = 0, gamma = 0 the returns are the rewards themselves."""
    rewards = 5 + 3 * torch.randn(4, 6)
    returns = [make_trainer(whiten_rewards=on, gamma=0, lam=0).compute_advantages(
        torch.zeros(4, 6), rewards, ones(4, 6))[2] for on in (True, False)]
    torch.testing.assert_close(returns[1], rewards)
    assert returns[0].var().item() == pytest.approx(1, abs=1e-4)
    assert returns[0].mean().item() == pytest.approx(rewards.mean().item(), abs=1e-4)


def test_one_token_alone_trains_and_stays_finite(make_trainer, make_batch, weights, moved):
    """P10: the variance of one advantage was 0 / 0, and every weight became NaN."""
    trainer = make_trainer(batch_size=1)
    before = weights(trainer.model)
    stats = trainer.step(*make_batch(((3, 1),)))
    assert moved(before, trainer.model) and all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(value.isfinite().all() for name, value in stats.items()
               if isinstance(value, torch.Tensor) and not name.endswith("var_explained"))


# ------------------------------------------------------------------------------------------------ the reference
def test_the_kl_is_measured_from_the_model_given_as_reference(make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3))
    queries, responses, scores = make_batch()
    policy, reference = trainer.model, trainer.ref_model
    kls = [(by_hand(policy, q, r)[1] - by_hand(reference, q, r)[1]).sum() for q, r in zip(queries, responses)]
    stats = trainer.step(queries, responses, scores)
    torch.testing.assert_close(stats["objective/kl_dist"], torch.stack(kls), atol=1e-4, rtol=1e-4)
    assert stats["objective/kl"].item() == pytest.approx(torch.stack(kls).mean().item(), rel=1e-4)


def test_without_a_reference_a_frozen_copy_of_the_first_policy_is_taken(make_trainer, make_batch, weights, moved):
    trainer = make_trainer()
    first = weights(trainer.ref_model)
    batch = make_batch()
    assert trainer.step(*batch)["objective/kl"] == 0
    assert trainer.step(*batch)["objective/kl"].abs() > 1e-3
    assert not moved(first, trainer.ref_model) and not any(p.requires_grad for p in trainer.ref_model.parameters())


@pytest.mark.parametrize("shared", [0, 1])
def test_shared_layers_are_one_storage_and_stay_as_they_are(shared, make_trainer, make_batch, weights, moved):
    """P21: they were frozen and yet copied."""
    trainer = make_trainer(num_shared_layers=shared)
    policy, reference = dict(trainer.model.named_parameters()), dict(trainer.ref_model.named_parameters())
    common = {name for name in policy if policy[name] is reference[name]}
    lower = ("wte.", "wpe.", *(f".h.{i}." for i in range(shared)))
    assert common == {name for name in policy if any(part in name for part in lower)}
    before = weights(trainer.model)
    trainer.step(*make_batch())
    assert moved(before, trainer.model) == set(policy) - common


def test_shared_layers_beside_a_reference_are_told(make_trainer, make_model):
    with pytest.warns(UserWarning, match="num_shared_layers"):
        make_trainer(ref_model=make_model(), num_shared_layers=1)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_the_reference_of_an_adapter_is_the_adapter_as_loaded(kind, arch, make_trainer, make_model, make_batch):
    """P18: it was the bare base model, so that an adapter from supervised training began with a huge KL."""
    trainer = make_trainer(make_model(arch, lora=kind))
    assert trainer.ref_model is None
    queries, responses, scores = make_batch(start=START.get(arch))
    first = [by_hand(trainer.model, q, r)[1] for q, r in zip(queries, responses)]
    stats = trainer.step(queries, responses, scores)
    assert stats["objective/kl_dist"].abs().max() < 1e-5
    for _ in range(3):
        stats = trainer.step(queries, responses, scores)
    torch.testing.assert_close(stats["objective/ref_logprobs"], torch.cat(first), atol=1e-5, rtol=1e-5)
    assert stats["objective/kl_dist"].abs().max() > 1e-3


def test_an_adapter_is_trained_alone(make_trainer, make_model, make_batch, weights, moved):
    model = make_model(lora="trained")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(model)
    before = weights(model)
    trainer.step(*make_batch())
    assert moved(before, model) == trainable  # the policy's lora_A and lora_B, and the value head; never the base
    assert {name.split(".")[-2] for name in trainable} == {"default", "summary"}


def test_a_float32_adapter_trains_on_a_bfloat16_base(make_hf_model, make_trainer, make_batch, weights, moved, tmp_path):
    from peft import LoraConfig
    make_hf_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path, dtype=torch.bfloat16, require_v_head=False, peft_config=LoraConfig(target_modules="all-linear"))
    trainer = make_trainer(model)
    before = weights(model)
    trainer.step(*make_batch())
    changed = moved(before, model)
    assert {before[name].dtype for name in changed} == {torch.float32}
    assert any("lora_B.default" in name for name in changed)
    assert model.pretrained_model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_a_reference_given_beside_an_adapter_is_used(make_trainer, make_model, make_batch):
    """P17: it was moved to the device and forgotten: KL 0."""
    trainer = make_trainer(make_model(lora="fresh"), ref_model=make_model(seed=3))
    queries, responses, scores = make_batch()
    want = torch.cat([by_hand(trainer.ref_model, q, r)[1] for q, r in zip(queries, responses)])
    stats = trainer.step(queries, responses, scores)
    torch.testing.assert_close(stats["objective/ref_logprobs"], want, atol=1e-5, rtol=1e-5)
    assert stats["objective/kl_dist"].abs().max() > 0.1


# ------------------------------------------------------------------------------------------------ rewards
LOGP, REF = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -1.5, -3.0]])
PENALTY = {"kl": [1.0, -0.5, 0.0], "abs": [1.0, 0.5, 0.0], "mse": [0.5, 0.125, 0.0]}  # of differences 1, -1/2, 0


@pytest.mark.parametrize("kind", PENALTY)
def test_each_token_pays_its_penalty_and_the_last_gets_the_score(kind, make_trainer):
    trainer = make_trainer(kl_penalty=kind, init_kl_coef=0.5)
    rewards, non_score, kls = trainer.compute_rewards(torch.tensor([2.0]), LOGP, REF, torch.tensor([[1, 1, 1]]))
    penalty = torch.tensor([PENALTY[kind]])
    torch.testing.assert_close(kls, penalty)
    torch.testing.assert_close(non_score, -0.5 * penalty)
    torch.testing.assert_close(rewards, -0.5 * penalty + torch.tensor([[0, 0, 2.0]]))


def test_the_full_penalty_is_the_exact_divergence_of_the_two_models(make_trainer, make_model, make_batch):
    trainer = make_trainer(kl_penalty="full", ref_model=make_model(seed=3), init_kl_coef=1.0, temperature=0.8)
    queries, responses, scores = make_batch()
    pairs = [[by_hand(m, q, r, 0.8)[0] for m in (trainer.model, trainer.ref_model)] for q, r in zip(queries, responses)]
    want = torch.cat([(p.exp() * (p - ref)).sum(-1) for p, ref in pairs])
    stats = trainer.step(queries, responses, scores)
    assert want.min() > 0 and stats["ppo/mean_non_score_reward"].item() == pytest.approx(-want.mean().item(), rel=1e-4)


def test_the_score_falls_on_the_last_token_that_the_policy_wrote(make_trainer):
    masks = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]])
    zeros = torch.zeros(3, 4)
    rewards, _, _ = make_trainer().compute_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, masks)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 3, 0]]


def test_the_controller_sees_one_kl_whatever_the_penalty(make_trainer, make_model, make_batch):
    """P38: with 'mse' or 'full' it steered sums of another quantity to the same target."""
    kls, coefs = set(), set()
    for kind in ("kl", "abs", "mse", "full"):
        trainer = make_trainer(kl_penalty=kind, ref_model=make_model(seed=3), target=6.0, horizon=100)
        kls.add(trainer.step(*make_batch())["objective/kl"].item())
        coefs.add(trainer.kl_ctl.value)
    assert len(kls) == len(coefs) == 1 and coefs != {0.2}


@pytest.mark.parametrize("target, horizon", [(1e-3, 10), (1e-3, 40), (1e9, 10)])
def test_the_kl_coefficient_follows_target_and_horizon(target, horizon, make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3), target=target, horizon=horizon, init_kl_coef=0.3)
    stats = trainer.step(*make_batch())
    error = max(-0.2, min(0.2, stats["objective/kl"].item() / target - 1))
    assert abs(error) == pytest.approx(0.2) and stats["objective/kl_coef"] == 0.3  # the one that was used
    assert trainer.kl_ctl.value == pytest.approx(0.3 * (1 + error * 4 / horizon))
    assert trainer.step(*make_batch())["objective/kl_coef"] == pytest.approx(trainer.kl_ctl.value, rel=0.1)


def test_the_kl_coefficient_stays_where_it_is_not_to_adapt(make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3), adap_kl_ctrl=False, init_kl_coef=0.3, horizon=1)
    trainer.step(*make_batch())
    assert trainer.kl_ctl.value == 0.3


def step_with_scores(trainer, make_batch, *scores):
    queries, responses, _ = make_batch(((3, 2),) * len(scores))
    stats = trainer.step(queries, responses, scores_of(*scores))
    return stats["ppo/mean_scores"].item(), stats["ppo/std_scores"].item(), stats["objective/scores"].item()


@pytest.mark.parametrize("norm", [False, True])
def test_scores_are_scaled_by_all_scores_so_far(norm, make_trainer, make_batch):
    trainer = make_trainer(use_score_scaling=True, use_score_norm=norm)
    step_with_scores(trainer, make_batch, 1, 2, 3, 6)  # mean 3, variance 14/3
    mean, std, raw = step_with_scores(trainer, make_batch, 4, 4, 8, 12)  # of all eight: mean 5, variance 90/7
    sigma = (90 / 7) ** 0.5
    assert mean == pytest.approx((7 - 5 * norm) / sigma, rel=1e-5)
    assert std == pytest.approx((44 / 3) ** 0.5 / sigma, rel=1e-5) and raw == 7


def test_scores_are_left_alone_unless_told(make_trainer, make_batch):
    assert step_with_scores(make_trainer(), make_batch, 1, 2, 3, 6)[0] == 3


def test_scores_are_clipped(make_trainer, make_batch):
    assert step_with_scores(make_trainer(score_clip=2.0), make_batch, -9, 1, 2, 9)[0] == 0.75  # -2, 1, 2, 2


def test_scores_are_clipped_after_they_are_scaled(make_trainer, make_batch):
    mean, _, _ = step_with_scores(make_trainer(score_clip=0.5, use_score_scaling=True), make_batch, -90, 90, 90, 90)
    assert mean == pytest.approx(0.25)


def test_a_first_score_alone_counts(make_trainer, make_batch):
    """P11: its standard deviation was infinite, so that it became 0."""
    trainer = make_trainer(batch_size=1, use_score_scaling=True)
    assert step_with_scores(trainer, make_batch, 2)[0] == pytest.approx(2)


# ------------------------------------------------------------------------------------------------ the loss
def loss_of(trainer, old=0.0, new=0.0, value=0.0, vpred=0.0, advantage=1.0, target=0.0):
    """The losses of one token."""
    one = lambda x: torch.tensor([[float(x)]])
    logits = torch.zeros(1, 1, 8)
    pg, vf, stats = trainer.loss(*map(one, (old, value)), logits, *map(one, (vpred, new, 1, advantage, target)))
    return pg.item(), vf.item(), stats


@pytest.mark.parametrize("cliprange", [0.1, 0.3])
def test_the_ratio_is_clipped_to_cliprange(cliprange, make_trainer):
    trainer = make_trainer(cliprange=cliprange)
    pg, _, stats = loss_of(trainer, new=1.0)  # ratio e
    assert pg == pytest.approx(-(1 + cliprange)) and stats["policy/clipfrac"] == 1
    assert loss_of(trainer, new=1.0, advantage=-1.0)[0] == pytest.approx(math.e)  # a worse action is never let off


@pytest.mark.parametrize("cliprange_value, vf_coef", [(0.2, 0.1), (0.2, 0.5), (0.5, 0.1)])
def test_the_value_loss_is_clipped_and_weighed(cliprange_value, vf_coef, make_trainer):
    trainer = make_trainer(cliprange_value=cliprange_value, vf_coef=vf_coef)
    _, vf, stats = loss_of(trainer, value=0.0, vpred=1.0, target=1.0)  # right, but too far from the old one
    assert vf == pytest.approx(vf_coef * 0.5 * (1 - cliprange_value) ** 2) and stats["val/clipfrac"] == 1
    assert stats["loss/total"].item() == pytest.approx(stats["loss/policy"].item() + vf)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.95), (0.9, 0.5)])
def test_gamma_and_lam_discount(gamma, lam, make_trainer):
    """No values, a last reward of 1, two tokens before it: the returns are (gamma lam)^2, gamma lam, 1."""
    trainer = make_trainer(gamma=gamma, lam=lam)
    _, _, returns = trainer.compute_advantages(torch.zeros(1, 3), torch.tensor([[0, 0, 1.0]]), ones(1, 3))
    torch.testing.assert_close(returns, torch.tensor([[(gamma * lam) ** 2, gamma * lam, 1.0]]))


# ------------------------------------------------------------------------------------------------ the optimizer
@pytest.mark.parametrize("sizes, steps", [
    ({"ppo_epochs": 3}, 3), ({"mini_batch_size": 1}, 4), ({"mini_batch_size": 1, "gradient_accumulation_steps": 2}, 2),
    ({"mini_batch_size": 1, "gradient_accumulation_steps": 4, "ppo_epochs": 2}, 2)])
def test_an_update_takes_its_optimizer_steps(sizes, steps, make_trainer, make_batch):
    trainer = make_trainer(**sizes)
    norms = gradient_norms(trainer)
    trainer.step(*make_batch())
    assert len(norms) == steps


def test_every_batch_of_the_dataloader_takes_as_many_optimizer_steps(make_trainer, make_batch):
    """P4: on the last one each micro-batch became a step of its own."""
    dataset = [{"input_ids": [i]} for i in range(4, 12)]
    trainer = make_trainer(mini_batch_size=1, gradient_accumulation_steps=4, dataset=dataset)
    norms, counts = gradient_norms(trainer), []
    for batch in trainer.dataloader:
        trainer.step(batch["input_ids"], *make_batch()[1:])
        counts.append(len(norms))
    assert counts == [1, 2]


def test_every_row_is_trained_once_an_epoch(make_trainer, make_batch):
    stats = make_trainer(mini_batch_size=1, ppo_epochs=2, learning_rate=0.0).step(*make_batch())
    first, second = stats["ppo/policy/advantages"].split(14)
    torch.testing.assert_close(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)  # in another order


@pytest.mark.parametrize("arch, lora", [("gpt2", None), ("t5", None), ("llama", "trained")])
def test_accumulated_gradients_are_those_of_one_big_minibatch(arch, lora, make_trainer, make_model, make_batch):
    """P29: micro-batches of 1, 2, 4 and 24 tokens weighed alike; each token weighs alike."""
    results = []
    for mini, steps in ((4, 1), (2, 2), (1, 4)):
        model = make_model(arch, lora=lora)
        trainer = make_trainer(model, optimizer=sgd(model), mini_batch_size=mini, gradient_accumulation_steps=steps)
        stats = trainer.step(*make_batch(((3, 1), (5, 2), (2, 4), (4, 24)), start=START.get(arch)))
        results.append([stats["ppo/loss/total"], stats["ppo/policy/entropy"], *model.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_gradient_is_the_mean_over_tokens_not_over_rows(make_trainer, make_model, make_batch):
    """The value head's bias has the gradient vf_coef x mean over all tokens of (V - R^)."""
    model = make_model()
    trainer = make_trainer(model, optimizer=sgd(model, lr=1.0), vf_coef=1.0, mini_batch_size=1,
                           gradient_accumulation_steps=4)
    before = model.v_head.summary.bias.item()
    stats = trainer.step(*make_batch())
    assert before - model.v_head.summary.bias.item() == pytest.approx(
        (stats["ppo/val/vpred"] - stats["ppo/returns/mean"]).item(), rel=1e-4)


def test_max_grad_norm_holds_at_every_optimizer_step(make_trainer, make_batch):
    """P1: it held at the first alone."""
    norms = {}
    for limit in (None, 1e-3):
        trainer = make_trainer(mini_batch_size=1, ppo_epochs=2, max_grad_norm=limit, learning_rate=1e-5)
        norms[limit] = gradient_norms(trainer)
        trainer.step(*make_batch())
        trainer.step(*make_batch())
    assert len(norms[1e-3]) == len(norms[None]) == 16 and min(norms[None]) > 1e-2
    assert norms[1e-3] == pytest.approx([1e-3] * 16, rel=1e-3)


def test_the_learning_rate_is_adam_s(make_trainer, make_batch, weights):
    """Adam's first step moves a weight by the learning rate, whatever its gradient."""
    trainer = make_trainer(learning_rate=3e-4)
    before = weights(trainer.model)
    stats = trainer.step(*make_batch())
    largest = max((p - before[name]).abs().max().item() for name, p in trainer.model.named_parameters())
    assert largest == pytest.approx(3e-4, rel=1e-2) and stats["ppo/learning_rate"] == 3e-4


def test_an_optimizer_of_one_s_own_is_used(make_trainer, make_model, make_batch, weights, moved):
    model = make_model()
    trainer = make_trainer(model, optimizer=torch.optim.SGD(model.v_head.parameters(), lr=0.5))
    before = weights(model)
    assert trainer.step(*make_batch())["ppo/learning_rate"] == 0.5
    assert moved(before, model) == {"v_head.summary.weight", "v_head.summary.bias"}


def test_gradients_stay_on_the_parameters_zeroed(make_trainer, make_batch):
    trainer = make_trainer()
    trainer.step(*make_batch())
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_scheduler_steps_once_an_update(ranks, make_trainer, make_model, make_batch, monkeypatch):
    """P28: it took as many steps as there are ranks."""
    model = make_model()
    optimizer = sgd(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = make_trainer(model, optimizer=optimizer, lr_scheduler=scheduler, mini_batch_size=1, ppo_epochs=2)
    assert trainer.lr_scheduler.scheduler is scheduler and trainer.optimizer.optimizer is optimizer
    monkeypatch.setitem(PartialState._shared_state, "num_processes", ranks)
    rates = [trainer.step(*make_batch())["ppo/learning_rate"] for _ in range(3)]
    assert rates == [1e-3, 0.5e-3, 0.25e-3]


@pytest.mark.parametrize("arch, lora, layer", [
    ("gpt2", None, "h.0.mlp"), ("llama", None, "layers.0.mlp"), ("llama", "trained", "layers.0.mlp"),
    ("t5", None, "decoder.block.0.layer.2")])
def test_gradient_checkpointing_recomputes_and_changes_nothing(arch, lora, layer, make_trainer, make_model, make_batch):
    """P3: the gradient's pass ran in eval mode, where checkpointing does nothing."""
    def run(checkpointing):
        model, calls = make_model(arch, lora=lora), []
        if checkpointing:
            model.gradient_checkpointing_enable()
        trainer = make_trainer(model, optimizer=sgd(model))
        module = next(m for name, m in model.named_modules() if name.endswith(layer))
        module.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))
        for _ in range(2):
            trainer.step(*make_batch(start=START.get(arch)))
        return calls.count(True), list(model.parameters())

    (once, plain), (twice, checkpointed) = run(False), run(True)
    assert (once, twice) == (2, 4)
    for a, b in zip(plain, checkpointed):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ when not to step
def test_a_ratio_above_the_threshold_takes_no_step_at_all(make_trainer, make_batch, weights, moved):
    """P12: the loss was multiplied by 0 and Adam's momentum moved the weights all the same."""
    trainer = make_trainer()
    batch = make_batch()
    trainer.step(*batch)
    trainer.config.ratio_threshold = 0.0
    before, norms = weights(trainer.model), gradient_norms(trainer)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        stats = trainer.step(*batch)
    assert not moved(before, trainer.model) and not norms
    assert stats["ppo/policy/skipped"] == 1 and stats["ppo/loss/policy"] == 0 and stats["ppo/loss/value"] == 0
    trainer.config.ratio_threshold = 10.0
    assert trainer.step(*batch)["ppo/policy/skipped"] == 0 and len(norms) == 1 and norms[0] > 0


def minibatch(trainer, shift, make_batch):
    """A minibatch by itself, whose old log-probabilities are the present ones and a shift."""
    queries, responses, _ = make_batch()
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        trainer.model, queries, responses, trainer.prepare_model_inputs(queries, responses), return_logits=True)
    advantages = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
    return trainer.train_minibatch((logprobs + shift * mask).detach(), values.detach(), logprobs, logits, values, mask,
                                   advantages, advantages)


def test_a_ratio_that_overflows_harms_nothing(make_trainer, make_batch, weights, moved):
    """P12: inf x 0 made the loss and every gradient NaN."""
    trainer = make_trainer()
    before = weights(trainer.model)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        stats = minibatch(trainer, -200.0, make_batch)
    assert stats["loss/total"] == 0 and not moved(before, trainer.model)
    minibatch(trainer, 0.0, make_batch)
    assert moved(before, trainer.model) and all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_minibatch_can_be_trained_by_itself(make_trainer, make_batch, weights, moved):
    trainer = make_trainer(early_stopping=True, target_kl=10.0)
    before = weights(trainer.model)
    stats = minibatch(trainer, 0.0, make_batch)
    assert len(moved(before, trainer.model)) == len(before)
    assert stats["policy/approxkl"] == 0 and stats["policy/ratio"].shape == (4, 5)


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_early_stopping_does_not_depend_on_the_direction(shift, make_trainer, make_batch, weights, moved):
    """P13: old minus new was taken for the KL, so that half of all moves went unseen."""
    for target, stays in ((0.01, True), (10.0, False)):
        trainer = make_trainer(early_stopping=True, target_kl=target)
        before = weights(trainer.model)
        minibatch(trainer, shift, make_batch)
        assert bool(moved(before, trainer.model)) != stays


def test_early_stopping_sees_a_minibatch_that_is_left_out_too(make_trainer, make_batch):
    trainer = make_trainer(early_stopping=True, target_kl=0.01)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        minibatch(trainer, -3.0, make_batch)
    assert trainer._stop


def test_one_minibatch_above_the_threshold_drops_its_whole_optimizer_step(make_trainer, make_batch, weights, moved):
    trainer, thresholds = make_trainer(mini_batch_size=2, gradient_accumulation_steps=2), iter([0.0, 10.0, 10.0, 10.0])
    real = trainer.loss

    def loss(*args):
        trainer.config.ratio_threshold = next(thresholds)
        return real(*args)

    trainer.loss = loss
    before = weights(trainer.model)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        assert trainer.step(*make_batch())["ppo/policy/skipped"].item() == pytest.approx(0.5, abs=0.2)
    assert not moved(before, trainer.model)
    trainer.step(*make_batch())  # nothing of the dropped gradient is left
    assert moved(before, trainer.model)


def running_kl(stats, epochs, minibatches):
    """Mean of rho - 1 - log rho over each epoch so far, minibatch by minibatch."""
    k3 = stats["ppo/policy/ratio"].view(epochs, minibatches, -1)
    k3 = (k3 - 1 - k3.log()).mean(-1)
    return (k3.cumsum(1) / torch.arange(1, minibatches + 1)).flatten()


def test_early_stopping_ends_the_epochs_before_the_step_that_goes_too_far(make_trainer, make_batch):
    """P13: the last minibatch alone was looked at, when all steps of its epoch had been taken."""
    batch = make_batch(((4, 4),) * 8, seed=3)
    sizes = {"batch_size": 8, "mini_batch_size": 2, "ppo_epochs": 3, "learning_rate": 3e-3}
    kl = running_kl(make_trainer(**sizes).step(*batch), 3, 4)
    highest = kl.cummax(0).values
    first = next(i for i in range(5, 8) if kl[i] > 1.2 * highest[i - 1])  # within the second epoch
    trainer = make_trainer(early_stopping=True, target_kl=(kl[first] + highest[first - 1]).item() / 3, **sizes)
    norms = gradient_norms(trainer)
    stats = trainer.step(*batch)
    assert len(norms) == first and len(stats["ppo/policy/ratio"]) == 8 * (first + 1)
    trainer.step(*batch)
    assert len(norms) > first  # the next batch starts anew


def test_without_early_stopping_target_kl_stops_nothing(make_trainer, make_batch):
    trainer = make_trainer(mini_batch_size=1, ppo_epochs=3, target_kl=1e-9)
    norms = gradient_norms(trainer)
    trainer.step(*make_batch())
    assert len(norms) == 12


@pytest.mark.parametrize("sick", ["v_head.summary.bias", "transformer.ln_f.weight"])
def test_a_loss_that_is_not_finite_ends_the_run_before_any_weight_moves(sick, make_trainer, make_batch, weights):
    trainer = make_trainer()
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if name.endswith(sick)).fill_(math.nan)
    before = weights(trainer.model)
    with pytest.raises(InputError, match="the loss is nan after 0 PPO updates"):
        trainer.step(*make_batch())
    assert all(torch.equal(before[name].nan_to_num(), p.nan_to_num()) for name, p in trainer.model.named_parameters())


# ------------------------------------------------------------------------------------------------ what it costs
def test_logits_are_made_of_the_response_s_tokens_alone_and_kept_once(make_trainer, make_batch):
    """P30: the entropy alone, which is only logged, kept four copies of all logits, prompts included."""
    trainer, kept, rows = make_trainer(), [], []
    own = {p.data_ptr() for p in trainer.model.parameters()}
    head = trainer.model.pretrained_model.lm_head
    head.register_forward_hook(lambda module, args, logits: rows.append(logits.shape[:-1].numel()))
    batch = make_batch(((20, 4), (20, 2), (20, 5), (20, 3)))

    def keep(x):
        if x.dim() and x.shape[-1] == VOCAB and x.data_ptr() not in own:
            kept.append((x.data_ptr(), x.numel()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.step(*batch)
    assert rows == [14, 14]  # the policy's pass without gradient, and that with
    assert sum(dict(kept).values()) <= 14 * VOCAB


# ------------------------------------------------------------------------------------------------ statistics
def test_a_step_tells_all_that_users_of_trl_read(make_trainer, make_batch):
    names = """objective/kl objective/kl_dist objective/logprobs objective/ref_logprobs objective/kl_coef
        objective/entropy ppo/mean_non_score_reward ppo/mean_scores ppo/std_scores ppo/learning_rate
        tokens/queries_len_mean tokens/queries_len_std tokens/queries_dist
        tokens/responses_len_mean tokens/responses_len_std tokens/responses_dist
        ppo/loss/policy ppo/loss/value ppo/loss/total ppo/policy/entropy ppo/policy/approxkl ppo/policy/policykl
        ppo/policy/clipfrac ppo/policy/advantages ppo/policy/advantages_mean ppo/policy/ratio ppo/returns/mean
        ppo/returns/var ppo/val/vpred ppo/val/error ppo/val/clipfrac ppo/val/mean ppo/val/var ppo/val/var_explained
        time/ppo/forward_pass time/ppo/compute_rewards time/ppo/compute_advantages time/ppo/optimize_step
        time/ppo/calc_stats time/ppo/total""".split()
    stats = make_trainer().step(*make_batch())
    assert set(names) <= set(stats)
    assert all(math.isfinite(stats[name]) for name in names if not isinstance(stats[name], torch.Tensor))
    seconds = [value for name, value in stats.items() if name.startswith("time/") and name != "time/ppo/total"]
    assert 0 < sum(seconds) <= stats["time/ppo/total"] * 1.001


def test_statistics_count_real_tokens_alone(make_trainer, make_batch):
    """P31: queries and padding were in the ratios, the advantages and the log-probabilities."""
    stats = make_trainer(mini_batch_size=1, ppo_epochs=2).step(*make_batch())
    assert {len(stats[f"objective/{name}"]) for name in ("logprobs", "ref_logprobs")} == {14}
    assert {len(stats[f"ppo/policy/{name}"]) for name in ("ratio", "advantages")} == {28}
    assert (stats["ppo/policy/ratio"] > 0).all() and len(stats["objective/kl_dist"]) == 4
    assert stats["tokens/queries_dist"].tolist() == [3, 6, 2, 4] and stats["tokens/queries_len_mean"] == 3.75
    assert stats["tokens/responses_dist"].tolist() == [4, 2, 5, 3]
    assert stats["tokens/responses_len_std"].item() == pytest.approx((5 / 3) ** 0.5)


def test_statistics_are_what_they_are_called(make_trainer, make_model, make_batch):
    trainer = make_trainer(ref_model=make_model(seed=3), init_kl_coef=0.5, mini_batch_size=1, learning_rate=0.0)
    queries, responses, scores = make_batch()
    logp, _, values = zip(*(by_hand(trainer.model, q, r) for q, r in zip(queries, responses)))
    entropy = torch.cat([-(p.exp() * p).sum(-1) for p in logp]).mean().item()
    stats = {name: value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
             for name, value in trainer.step(queries, responses, scores).items()}
    near = lambda x: pytest.approx(float(x), rel=1e-4, abs=1e-5)
    scores, values = torch.stack(scores), torch.cat(values)
    drift = stats["objective/logprobs"] - stats["objective/ref_logprobs"]
    assert stats["objective/kl"] == near(stats["objective/kl_dist"].mean()) == near(drift.sum() / 4)
    assert stats["ppo/mean_non_score_reward"] == near(-0.5 * drift.mean())
    assert stats["objective/entropy"] == near(-stats["objective/logprobs"].sum() / 4)
    assert stats["ppo/policy/entropy"] == near(entropy)
    assert (stats["ppo/mean_scores"], stats["ppo/std_scores"]) == (near(scores.mean()), near(scores.std()))
    assert stats["ppo/val/mean"] == near(values.mean()) == stats["ppo/val/vpred"]
    assert stats["ppo/val/var"] == near(values.var())
    assert stats["ppo/loss/total"] == near(stats["ppo/loss/policy"] + 0.1 * stats["ppo/loss/value"])
    assert stats["ppo/loss/value"] == near(0.5 * stats["ppo/val/error"])  # nothing has moved: nothing is clipped
    assert stats["ppo/val/var_explained"] == near(1 - stats["ppo/val/error"] / stats["ppo/returns/var"])


def test_each_epoch_tells_how_far_its_ratios_are_from_one(make_trainer, make_batch):
    """P33: with many updates a batch, ratios run away; one sees in which epoch."""
    stats = make_trainer(ppo_epochs=3, learning_rate=3e-3).step(*make_batch())
    ratios = stats["ppo/policy/ratio"].split(14)
    told = [stats[f"ppo/policy/log_ratio_epoch_{e}"].item() for e in range(3)]
    assert told == pytest.approx([ratio.log().abs().mean().item() for ratio in ratios], rel=1e-4, abs=1e-7)
    assert told[0] < 1e-6 < 0.01 < told[1] < told[2]


# ------------------------------------------------------------------------------------------------ the dataloader
DATASET = [{"input_ids": [i, i], "query": f"w{i}", "answer": i} for i in range(4, 14)]


def test_the_dataloader_keeps_all_columns_and_whole_batches(make_trainer):
    """P27: columns that the model does not take vanished, with the answers that a reward needs."""
    batches = list(make_trainer(dataset=DATASET).dataloader)
    assert [len(batch["query"]) for batch in batches] == [4, 4]
    seen = [(q.tolist(), text, answer) for batch in batches for q, text, answer
            in zip(batch["input_ids"], batch["query"], batch["answer"])]
    assert all(q == [answer, answer] and text == f"w{answer}" for q, text, answer in seen)
    answers = [answer for _, _, answer in seen]
    assert len(set(answers)) == 8 and answers != sorted(answers)


def test_a_collator_of_one_s_own_makes_the_batches(make_trainer):
    trainer = make_trainer(dataset=DATASET, data_collator=lambda rows: {"sum": sum(row["answer"] for row in rows)})
    assert sum(batch["sum"] for batch in trainer.dataloader) < sum(range(4, 14))


def test_too_few_rows_for_a_batch_are_told_as_such(make_trainer):
    """P26: an unrelated UnboundLocalError."""
    with pytest.raises(ValueError, match="10 rows.*16"):
        make_trainer(dataset=DATASET, batch_size=16)


def test_no_dataset_is_told(make_model, tokenizer):
    with pytest.warns(UserWarning, match="no dataset"):
        trainer = ppo.PPOTrainer(ppo.PPOConfig(), make_model(), tokenizer=tokenizer)
    assert trainer.dataloader is None


def test_columns_that_are_not_trained_on_are_kept_where_wished(monkeypatch, tmp_path):
    """remove_unused_columns, P27"""
    class Enough(Exception):
        pass

    def load_prompts(*args, keep_columns, **kwargs):
        raise Enough(keep_columns)

    monkeypatch.setattr(ppo, "load_prompts", load_prompts)
    for remove in (True, False):
        with pytest.raises(Enough, match=str(not remove)):
            ppo.main(ppo.PPOConfig(remove_unused_columns=remove, output_dir=str(tmp_path)))


# ------------------------------------------------------------------------------------------------ trackers
def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(str(folder))
    log.Reload()
    return log


def test_tensorboard_gets_numbers_vectors_and_the_table(make_trainer, make_batch, tmp_path):
    trainer = make_trainer(
        log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path / "logs")}, tracker_project_name="mine",
        tracker_kwargs={"tensorboard": {"filename_suffix": ".try7"}})
    queries, responses, scores = make_batch()
    stats = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, {"query": list("abcd"), "response": list("efgh")}, scores)
    trainer.accelerator.end_training()
    log = events(tmp_path / "logs" / "mine")
    assert list((tmp_path / "logs" / "mine").glob("events*.try7"))
    told = {name: log.Scalars(name)[0] for name in ("objective/kl_coef", "env/reward_mean")}
    assert [event.step for event in told.values()] == [1, 1]
    assert [event.value for event in told.values()] == pytest.approx([0.2, torch.stack(scores).mean().item()])
    assert {"objective/kl_dist", "env/reward_dist"} <= set(log.Tags()["histograms"])
    assert "a | e" in log.Tensors("game_log/text_summary")[0].tensor_proto.string_val[0].decode()


def test_wandb_gets_a_table_of_the_columns_asked_for(make_trainer, make_batch, monkeypatch):
    class Tracker:
        name, logged, tables = "wandb", {}, []
        log = lambda self, values, step, **kwargs: self.logged.update(values)
        log_table = lambda self, name, columns, data, step: self.tables.append((name, columns, data, step))

    trainer = make_trainer()
    trainer.config.log_with, trainer.accelerator.trackers = "wandb", [Tracker()]
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"Histogram": list}))
    queries, responses, _ = make_batch(((2, 2), (2, 2)))
    stats = trainer.step(queries, responses, scores_of(1, 3))
    trainer.log_stats(stats, {"query": ["a", "b"], "gold": [7, 8]}, scores_of(1, 3), columns_to_log=["query", "gold"])
    assert Tracker.tables == [("game_log", ["query", "gold", "reward"], [["a", 7, 1.0], ["b", 8, 3.0]], 1)]
    assert Tracker.logged["env/reward_mean"] == 2 and Tracker.logged["env/reward_dist"] == [1.0, 3.0]


def test_without_a_tracker_nothing_is_logged(make_trainer, make_batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    queries, responses, scores = make_batch()
    stats = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, {"query": list("abcd"), "response": list("efgh")}, scores)
    assert not list(tmp_path.iterdir())


def test_a_column_that_is_not_in_the_batch_is_named(make_trainer):
    with pytest.raises(ValueError, match="response"):
        make_trainer().log_stats({}, {"query": ["a"]}, scores_of(1))


# ------------------------------------------------------------------------------------------------ what is kept
def test_a_saved_policy_opens_as_a_plain_model_with_a_card(make_trainer, make_batch, tmp_path):
    trainer = make_trainer(task_name="kindness", exp_name="try-7", model_name="my/model")
    trainer.step(*make_batch())
    folder = tmp_path / "new" / "folder"
    trainer.save_pretrained(str(folder))
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        want, _, values = trainer.model(tokens)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits, want)
        again = AutoModelForCausalLMWithValueHead.from_pretrained(folder, require_v_head=True).eval()
        torch.testing.assert_close(again(tokens)[2], values)
    assert AutoTokenizer.from_pretrained(folder)("w5 w7").input_ids == [5, 7]
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("kindness", "try-7", "my/model", "1 updates of 4"))


def test_the_reference_adapter_is_not_saved(make_trainer, make_model, make_batch, tmp_path):
    from safetensors.torch import load_file
    trainer = make_trainer(make_model(lora="trained"))
    trainer.step(*make_batch())
    trainer.save_pretrained(str(tmp_path / "out"))
    files = {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= files
    assert "model.safetensors" not in files
    assert not any("reference" in path.name for path in (tmp_path / "out").rglob("*"))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    policy = {name: p for name, p in trainer.model.named_parameters() if ".default." in name}
    assert len(saved) == len(policy)
    for name, p in policy.items():
        assert torch.equal(saved[name.removeprefix("pretrained_model.").replace(".default", "")], p)


def test_the_model_card_can_be_written_alone(make_trainer, tmp_path):
    make_trainer("t5").create_model_card(str(tmp_path / "card"), model_name="Ours")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "# Ours" in card and "AutoModelForSeq2SeqLM" in card


@pytest.mark.parametrize("compare_steps, pushed_at", [(1, [1, 2, 4]), (2, [2, 4])])
def test_the_best_raw_score_is_pushed(compare_steps, pushed_at, make_trainer, make_batch):
    """P35: clipped and scaled scores were compared, those of the rank alone."""
    where, calls = {"repo_id": "me/best", "private": True}, []
    trainer = make_trainer(push_to_hub_if_best_kwargs=where, compare_steps=compare_steps, score_clip=0.1,
                           use_score_scaling=True, use_score_norm=True)
    trainer.push_to_hub = lambda **kwargs: calls.append((trainer.current_step, kwargs))
    for score in (3.0, 7.0, 7.0, 8.0, 5.0):
        step_with_scores(trainer, make_batch, score, score + 1)
    assert [step for step, _ in calls] == pushed_at
    assert all(kwargs == where for _, kwargs in calls)


def test_nothing_is_pushed_unasked(make_trainer, make_batch):
    trainer = make_trainer()
    trainer.push_to_hub = None  # would not survive a call
    trainer.step(*make_batch())


def test_model_value_head_and_tokenizer_go_to_one_repository(make_trainer, monkeypatch):
    trainer, calls = make_trainer(), []
    for part in (trainer.policy, trainer.tokenizer):
        monkeypatch.setattr(part, "push_to_hub", lambda **kwargs: calls.append(kwargs))
    trainer.push_to_hub(repo_id="me/it", private=True, commit_message="done")
    kwargs, others = calls
    assert kwargs["commit_message"] == "done"
    assert kwargs["repo_id"] == others["repo_id"] == "me/it" and kwargs["private"] is others["private"] is True


@pytest.mark.parametrize("lora", [None, "trained"])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_numbers(lora, make_trainer, make_model, tmp_path):
    """P24: weights were all that could be kept."""
    def start():
        model = make_model(lora=lora)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return make_trainer(model, optimizer=optimizer, lr_scheduler=scheduler, mini_batch_size=2, ppo_epochs=2,
                            use_score_scaling=True, horizon=50, target=1e-3)

    def update(trainer):
        queries = [torch.randint(4, VOCAB, (3,)) for _ in range(4)]
        responses = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=4)
        return trainer.step(queries, responses, list(torch.randn(4)))

    one = start()
    update(one), update(one)
    one.save_checkpoint(tmp_path)
    want = update(one)
    ppo.set_seed(99)
    two = start()
    two.load_checkpoint(tmp_path / "checkpoint-2")
    got = update(two)
    assert two.current_step == one.current_step == 3 and two.kl_ctl.value == one.kl_ctl.value != 0.2
    assert vars(two.running)["mean"] == vars(one.running)["mean"] and two.highest_reward == one.highest_reward
    assert got["ppo/learning_rate"] == want["ppo/learning_rate"] != 1e-3
    figures = [name for name in want if not name.startswith("time/")]
    assert all(torch.equal(torch.as_tensor(want[name]), torch.as_tensor(got[name])) for name in figures)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))


def test_a_run_that_is_resumed_learns_at_the_rate_it_is_now_told(make_trainer, make_batch, tmp_path):
    trainer = make_trainer()
    trainer.step(*make_batch())
    trainer.save_checkpoint(tmp_path)
    slower = make_trainer(learning_rate=1e-6)
    slower.load_checkpoint(tmp_path / "checkpoint-1")
    assert slower.step(*make_batch())["ppo/learning_rate"] == 1e-6


def test_a_short_query_does_not_pay_for_the_longest_of_the_batch(make_trainer, monkeypatch):
    """An encoder-decoder's queries too: as many of their tokens go through at once as of answers."""
    trainer, widths = make_trainer("t5", batch_size=2, mini_batch_size=1), []
    encoder = trainer.policy.pretrained_model.get_encoder()
    encoder.register_forward_pre_hook(lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    monkeypatch.setattr(ppo, "FORWARD_TOKENS", 40)
    queries = [torch.arange(4, 34), torch.arange(4, 7)]
    trainer.step(queries, [torch.tensor([PAD, 5, 6])] * 2, scores_of(1, 2))
    assert sorted(widths) == [(1, 3)] * 2 + [(1, 30)] * 2  # one pass without gradient and one with, a row at a time


def test_the_newest_checkpoint_alone_is_kept(make_trainer, make_batch, tmp_path):
    trainer = make_trainer()
    for _ in range(2):
        trainer.step(*make_batch())
        trainer.save_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_an_answer_that_does_not_end_pays_a_penalty(tmp_path):
    """P39: it had the full score."""
    reward = tmp_path / "reward.py"
    reward.write_text("def score(texts):\n    return [1.0] * len(texts)\n")
    sizes = {"batch_size": 4, "mini_batch_size": 4, "steps": 4, "ppo_epochs": 1, "max_new_tokens": 1}
    stats = ppo.main(ppo.PPOConfig(
        reward_model=f"{reward}:score", missing_eos_penalty=3.0, output_dir=str(tmp_path), **sizes))
    assert stats["objective/scores"] == -2 and stats["tokens/responses_len_mean"] == 1


# ------------------------------------------------------------------------------------------------ wrong inputs
def without(value):
    return lambda rows: rows[:1] + [value] + rows[2:]


@pytest.mark.parametrize("part, change, told", [
    ("queries", tuple, None),
    ("scores", without(torch.tensor([1.0])), None),
    ("responses", torch.stack, "responses must be a list"),
    ("responses", lambda rows: rows[:3], "responses must be a list of 4.*of 3"),
    ("scores", lambda rows: rows[:3], "scores must be a list of 4.*of 3"),
    ("masks", lambda rows: rows[:3], "response_masks must be a list of 4.*of 3"),
    ("queries", without([5, 6]), r"queries\[1\] must be a tensor"),
    ("queries", without(torch.tensor([[5, 6]])), r"queries\[1\] must be one-dimensional"),
    ("responses", without(torch.tensor([], dtype=torch.long)), r"responses\[1\]"),
    ("scores", without(1.0), r"scores\[1\] must be a tensor"),
    ("scores", without(torch.zeros(2)), r"scores\[1\] must be one number"),
    ("scores", without(torch.zeros(1, 1)), r"scores\[1\] must be one number"),
    ("scores", without(torch.tensor(math.nan)), r"scores\[1\] is nan"),
    ("scores", without(torch.tensor(-math.inf)), r"scores\[1\] is -inf"),
    ("masks", without(torch.tensor([1])), r"response_masks\[1\]"),
    ("masks", without(torch.tensor([0, 0])), r"response_masks\[1\]")])
def test_what_a_step_can_not_take_is_told_by_row_before_any_weight_moves(
        part, change, told, make_trainer, make_batch, weights, moved):
    """P19: an empty response was an index error deep inside."""
    trainer = make_trainer()
    queries, responses, scores = make_batch(((3, 2),) * 4)
    parts = {"queries": queries, "responses": responses, "scores": scores, "masks": [torch.tensor([1, 1])] * 4}
    parts[part] = change(parts[part])
    before = weights(trainer.model)
    if told is None:
        trainer.step(*parts.values())
    else:
        with pytest.raises(ValueError, match=told):
            trainer.step(*parts.values())
    assert bool(moved(before, trainer.model)) == (told is None)


def test_an_encoder_decoder_s_response_is_more_than_its_start(make_trainer, make_batch):
    """P19"""
    queries, responses, scores = make_batch(((3, 2), (3, 0)), start=PAD)
    with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
        make_trainer("t5").step(queries, responses, scores)


def test_an_encoder_decoder_s_mask_leaves_one_generated_token(make_trainer, make_batch):
    with pytest.raises(ValueError, match=r"response_masks\[1\]"):
        masks = [torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0])]
        make_trainer("t5").step(*make_batch(((3, 2), (3, 2)), start=PAD), masks)


def test_names_that_code_for_trl_calls(make_trainer, make_batch):
    trainer, (queries, responses, scores) = make_trainer(kl_penalty="mse"), make_batch()
    assert trainer._kl_penalty(torch.tensor(3.0), torch.tensor(1.0)) == 2
    checked = trainer._step_safety_checker(4, queries, responses, [score[None] for score in scores])
    assert [score.item() for score in checked[2]] == [score.item() for score in scores]
    with pytest.raises(ValueError, match="list of 3"):
        trainer._step_safety_checker(3, queries, responses, scores)
    inputs = trainer.prepare_model_inputs(queries, responses)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 8)
    assert inputs["attention_mask"].sum(1).tolist() == [q + r for q, r in ROWS]


@pytest.mark.parametrize("part, value", [("config", {"batch_size": 4}), ("model", "gpt2"), ("tokenizer", None),
                                         ("ref_model", "gpt2")])
def test_parts_that_do_not_go_together_are_refused(part, value, make_model, tokenizer):
    parts = {"config": ppo.PPOConfig(), "model": make_model(), "tokenizer": tokenizer, part: value}
    with pytest.raises(ValueError, match=part):
        ppo.PPOTrainer(**parts)


def test_a_model_without_a_value_head_is_refused(make_hf_model, tokenizer):
    with pytest.raises(ValueError, match="value head"):
        ppo.PPOTrainer(ppo.PPOConfig(), make_hf_model("gpt2"), tokenizer=tokenizer)
