"""docs/frontier.py: the exact optimum against brute force, what is measured, the page's table.

    python -m pytest -q tests/test_frontier.py
"""
import dataclasses
import itertools
import json
import math
import re

import pytest
import torch

import common
import dpo
import iterative_sft
import ppo
import sft

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(common.TOY)
    patch.syspath_prepend(common.TOY.parent / "docs")
    import frontier
    import make

DOCS = common.TOY.parent / "docs"
# a smaller grammar: 3 aspects, 2 adverbs, 2 adjectives of each mood, an uneven mood
ASPECTS, ADVERBS = ["plot", "music", "ending"], ["slightly", "utterly"]
MOODS = {"clever": 0.3, "fresh": 0.3, "dull": 0.2, "weak": 0.2}


def enumerate_reviews(clauses, begun):
    """Yield each way to complete a review, and its probability.

    begun: the judgements that the prompt makes; it ends with the next aspect."""
    aspects = [(ASPECTS[0], *rest) for rest in itertools.permutations(ASPECTS[1:], clauses - 1)]
    words = [(f"{adverb} {adjective}", p / len(ADVERBS))
             for adverb in ADVERBS for adjective, p in MOODS.items()]
    for order in aspects:
        for judgements in itertools.product(words, repeat=clauses - len(begun)):
            texts = [*begun, *[text for text, _ in judgements]]
            probability = math.prod(p for _, p in judgements) / len(aspects)
            yield make.write_review("", list(order), texts), probability


@pytest.mark.parametrize("begun", [[], ["utterly weak"]])
@pytest.mark.parametrize("beta", [0.4, 1.5])
def test_the_optimum_is_that_of_all_reviews_of_a_smaller_grammar_one_by_one(begun, beta):
    texts, reference = zip(*enumerate_reviews(3, begun), strict=True)
    assert len(set(texts)) == 2 * 8 ** (3 - len(begun)) and sum(reference) == pytest.approx(1)
    reference = torch.tensor(reference, dtype=torch.float64)
    values = torch.tensor([make.valence(text) for text in texts], dtype=torch.float64)
    best = reference * torch.exp(values / beta)
    best /= best.sum()
    fixed = sum(make.valence(text) for text in begun)  # the prompt's, which no response changes
    kl, valence = frontier.optimum(beta, 3 - len(begun), good=0.6, intensities=[0.5, 2.0])
    assert kl == pytest.approx((best * (best / reference).log()).sum().item(), rel=1e-9)
    assert valence == pytest.approx((best @ values).item() - fixed, rel=1e-9)


def test_no_policy_on_the_smaller_grammar_is_above_the_optimum():
    texts, reference = zip(*enumerate_reviews(2, []), strict=True)
    reference = torch.tensor(reference, dtype=torch.float64)
    values = torch.tensor([make.valence(text) for text in texts], dtype=torch.float64)
    noise = torch.randn(200, len(texts), dtype=torch.float64)
    for row in noise:
        policy = (reference.log() + values / 1.5 + row).softmax(0)
        kl = (policy * (policy / reference).log()).sum().item()
        # at the beta of the same KL
        low, high = 0.01, 100.0
        for _ in range(50):
            beta = math.sqrt(low * high)
            above = frontier.optimum(beta, 2, 0.6, [0.5, 2.0])[0] > kl
            low, high = (beta, high) if above else (low, beta)
        assert policy @ values < frontier.optimum(beta, 2, 0.6, [0.5, 2.0])[1]


def test_the_optimum_begins_at_the_grammars_mean_and_ends_at_the_highest_valence():
    kl, valence = frontier.optimum(1e4)
    assert [kl, valence] == pytest.approx([0, 4 * (0.35 - 0.65) * 1.25], abs=1e-3)
    kl, valence = frontier.optimum(1e-3)  # four times "utterly" and a positive adjective
    assert [kl, valence] == pytest.approx([-4 * math.log(0.35 / 4), 8])
    assert frontier.optimal_valence(frontier.optimum(0.7)[0]) == pytest.approx(
        frontier.optimum(0.7)[1])


def test_best_of_n_from_sorted_samples_is_the_mean_over_all_subsets(monkeypatch):
    torch.manual_seed(0)
    judged = {name: torch.randn(2 * 6) for name in ("proxy", "valence", "grammatical")}
    monkeypatch.setattr(frontier, "sample_initial", lambda *args: None)
    monkeypatch.setattr(frontier, "judge", lambda texts: judged)
    row, = frontier.best_of_n(1, [3], m=6)
    best = [max(subset, key=lambda i: judged["proxy"][6 * prompt + i]) + 6 * prompt
            for prompt in (0, 1) for subset in itertools.combinations(range(6), 3)]
    assert row["valence"] == pytest.approx(judged["valence"][best].mean().item(), abs=1e-4)
    assert row["kl"] == pytest.approx(math.log(3) - 2 / 3, abs=1e-4)


def test_the_kl_of_best_of_n_is_that_of_the_distribution_of_the_best():
    # of 5,000 equally likely texts, ranked: the best of n is text i with (i^n - (i-1)^n) / 5000^n
    i = torch.arange(5001, dtype=torch.float64) / 5000
    for n in (2, 16):
        best = i[1:] ** n - i[:-1] ** n
        kl = (best * (best * 5000).log()).nansum().item()
        assert frontier.best_of_n_kl(n) == pytest.approx(kl, abs=2e-3)


def test_reviews_are_recognized():
    text = ("to me the plot was very dull, the music was very fresh, the acting was fairly flat "
            "and the ending was very weak.")
    assert frontier.is_review(text)
    for wrong in (text[:-1], text.replace("music", "plot"), text.replace("fairly ", ""),
                  text.replace(" and", ","), text + " and"):
        assert not frontier.is_review(wrong)


def test_the_kl_along_responses_is_exact_and_ends_with_the_response():
    model, reference = (frontier.load(common.TOY / "model") for _ in range(2))
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(1.2)
    prompts = [torch.tensor([40, 41, 42]), torch.tensor([50])]
    responses = [torch.tensor([60, 61]), torch.tensor([62, 63, 1])]
    sums = frontier.kl_of_responses(model, reference, prompts, responses)
    for prompt, response, total in zip(prompts, responses, sums, strict=True):
        p, q = (m(torch.cat([prompt, response])[None]).logits[0].log_softmax(-1).detach()
                for m in (model, reference))
        kl = (p.exp() * (p - q)).sum(-1)  # of the token that follows each
        assert total.item() == pytest.approx(kl[len(prompt) - 1:-1].sum().item(), rel=1e-4)
    assert frontier.kl_of_responses(reference, reference, prompts, responses).tolist() == [0, 0]


CONFIGS = {"ppo.py": ppo.PPOConfig, "dpo.py": dpo.DPOConfig, "sft.py": sft.SFTConfig,
           "iterative_sft.py": iterative_sft.IterativeSFTConfig}


@pytest.mark.parametrize("name", [name for name, m in frontier.METHODS.items() if m.command])
def test_the_commands_have_flags_of_their_scripts(name):
    method = frontier.METHODS[name]
    script, *words = f"{method.command} {method.resume}".split()
    known = {field.name for field in dataclasses.fields(CONFIGS[script])}
    flags = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
    assert [flag for flag in flags if flag.removeprefix("no_") not in known] == []
    assert len(flags) > 0 and (not method.patch or (DOCS / "forks" / method.patch).is_file())


def test_a_quick_run_is_a_part_of_the_whole():
    quick = frontier.list_runs(quick=True)
    assert {name for name, _, _ in quick} == set(frontier.METHODS)
    assert set(quick) < set(frontier.list_runs(quick=False))


# ----------------------------------------------------------------------------- the page
def test_the_table_of_the_page_is_that_of_the_results():
    rows = [json.loads(line) for line in (DOCS / "frontier.jsonl").read_text().splitlines()]
    done = {(row["method"], row["beta"], row["seed"]) for row in rows}
    assert done == set(frontier.list_runs(quick=False))
    assert frontier.table(rows) in (DOCS / "frontier.md").read_text()


def test_the_optima_of_the_page_are_computed():
    page = (DOCS / "frontier.md").read_text()
    rows = re.findall(r"^\| β = ([\d.]+) \| ([\d.]+) \| ([−\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) >= 5
    for beta, kl, valence in rows:
        numbers = [float(kl), float(valence.replace("−", "-"))]
        assert numbers == pytest.approx(frontier.optimum(float(beta)), abs=0.005)


def test_figure_and_page_are_drawn_again_from_the_results(tmp_path):
    rows = [json.loads(line) for line in (DOCS / "frontier.jsonl").read_text().splitlines()]
    frontier.draw(rows, tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").stat().st_size > 20000
