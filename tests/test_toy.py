"""toy/: the data that the grammar gives, its mathematics by hand, and the shapes that are drawn.

    python -m pytest -q tests/test_toy.py
"""
import json
import math
import random
import re

import pytest
import torch
from transformers import AutoTokenizer

from common import TOY

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(TOY)
    import make
    import make_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data files, made again."""
    folder = tmp_path_factory.mktemp("toy")
    make.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    """The rows of all data files, keyed by the files' names."""
    return {file.stem: [json.loads(line) for line in file.open()] for file in folder.iterdir()}


def is_review(text):
    """Parse a text: is it a review of the grammar, with four different aspects?"""
    opening = "|".join(make.OPENINGS)
    adverb = "|".join(make.INTENSITY)
    adjective = "|".join(make.POSITIVE + make.NEGATIVE)
    clause = rf"the (\w+) was (?:{adverb}) (?:{adjective})"
    found = re.fullmatch(rf"(?:{opening}){clause}, {clause}, {clause} and {clause}\.", text)
    return bool(found) and len(set(found.groups()) & set(make.ASPECTS)) == 4


# ----------------------------------------------------------------------------- the data
@pytest.mark.parametrize("name, rows", [
    ("reviews", 6000), ("reviews_test", 500), ("prompts", 1024), ("pairs", 3000),
    ("pairs_test", 500)])
def test_the_files_in_toy_are_those_that_make_data_writes(name, rows, folder):
    # one other random draw, or one draw more, changes every later row
    text = (folder / f"{name}.jsonl").read_text()
    assert text == (TOY / f"{name}.jsonl").read_text()
    assert len(text.splitlines()) == rows


def test_reviews_follow_the_grammar(data):
    texts = [row["text"] for row in data["reviews"] + data["reviews_test"]]
    assert all(is_review(text) for text in texts)


def test_a_third_of_the_judgements_in_reviews_are_positive_and_half_in_pairs(data):
    # 24,000 and 28,000 judgements: standard errors are below 0.0032
    def count(texts):
        adjectives = [adjective for text in texts for _, adjective in make.JUDGEMENT.findall(text)]
        return sum(adjective in make.POSITIVE for adjective in adjectives) / len(adjectives)

    assert count(row["text"] for row in data["reviews"]) == pytest.approx(0.35, abs=0.01)
    assert count(row["prompt"] + row[side] for row in data["pairs"] + data["pairs_test"]
                 for side in ("chosen", "rejected")) == pytest.approx(0.5, abs=0.01)


def test_prompts_begin_reviews_with_every_opening_and_aspect(data):
    # 5 x 8 beginnings in 1,024 rows
    queries = {row["query"] for row in data["prompts"]}
    want = {f"{opening}the {aspect} was" for opening in make.OPENINGS for aspect in make.ASPECTS}
    assert queries == want


def test_chosen_and_rejected_complete_the_same_beginning_and_chosen_is_more_positive(data):
    for row in data["pairs"] + data["pairs_test"]:
        chosen, rejected = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
        assert is_review(chosen) and is_review(rejected)
        assert row["prompt"].endswith(" was")
        assert make.valence(chosen) > make.valence(rejected)


def test_a_third_of_the_pairs_begin_with_a_judgement(data):
    # 3,500 pairs: the standard error is 0.008
    rows = data["pairs"] + data["pairs_test"]
    begun = [row for row in rows if row["prompt"].count(" was") == 2]
    assert {row["prompt"].count(" was") for row in rows} == {1, 2}
    assert len(begun) / len(rows) == pytest.approx(1 / 3, abs=0.03)


def test_a_pair_with_a_margin_says_by_how_much_chosen_is_better():
    rows = make.draw_pairs_with_margins(300, "<eos>")
    for row in rows:
        difference = make.valence(row["chosen"]) - make.valence(row["rejected"])
        assert row["margin"] == difference and row["chosen"] != row["rejected"]
    # what was cut off the chosen text was sometimes what made it better
    assert len(rows) == 300 and min(row["margin"] for row in rows) < 0
    ends = [row["chosen"].endswith("<eos>") for row in rows]
    assert 0.4 < sum(ends) / 300 < 0.6


# ----------------------------------------------------------------------------- mathematics
@pytest.mark.parametrize("text, want", [
    # -2 + 1.5 - 1 - 1.5
    ("to me the plot was utterly dull, the music was very moving, the acting was fairly flat and "
     "the ending was very weak.", -3.0),
    ("the plot was slightly fresh, the", 0.5),
    ("the plot was slightly fresh and the music was slightly stale.", 0.0),
    ("the plot was utterly touching", 2.0),
    ("the plot was dull", 0.0),  # without an adverb it is no judgement
    ("", 0.0)])
def test_valence_by_hand(text, want):
    assert make.valence(text) == want


def test_entropy_by_hand():
    # aspects       log (8 x 7 x 6 x 5) = log 1680                   = 7.42655
    # mood          -0.35 log 0.35 - 0.65 log 0.65                   = 0.64745
    # judgement     0.64745 + log 4 adverbs + log 8 adjectives       = 4.11318
    # review        7.42655 + 4 x 4.11318                            = 23.87928
    assert make.entropy() == pytest.approx(23.87928, abs=1e-5)
    # all negative: the mood costs -log 0.65 = 0.43078; 7.42655 + 4 x (0.43078 + 3.46574) = 23.01263
    assert make.entropy(good=0.0) == pytest.approx(23.01263, abs=1e-5)


def test_entropy_is_the_mean_loss_of_the_grammar_on_given_reviews(data):
    losses, positive = [], 0
    for row in data["reviews_test"]:
        adjectives = [adjective for _, adjective in make.JUDGEMENT.findall(row["text"])]
        probability = 1 / 8 / 7 / 6 / 5  # of the aspects
        for adjective in adjectives:
            mood = 0.35 if adjective in make.POSITIVE else 0.65
            probability *= mood / 4 / 8  # adverbs, adjectives
        losses.append(-math.log(probability))
        positive += sum(adjective in make.POSITIVE for adjective in adjectives)
    mean = sum(losses) / len(losses)
    assert make.entropy(positive / (4 * len(losses))) == pytest.approx(mean, rel=1e-9)


def test_a_begun_review_keeps_its_parts():
    begun = ("to me ", ["plot", "music"], ["very dull"])
    opening, aspects, judgements = make.complete_review(random.Random(0), *begun, good=0.5)
    assert (opening, aspects[:2], judgements[:1]) == begun
    assert begun[1:] == (["plot", "music"], ["very dull"])  # not changed in place
    assert len(set(aspects)) == len(judgements) == 4
    assert is_review(make.write_review(opening, aspects, judgements))


# ----------------------------------------------------------------------------- tokenizers
def test_the_tokenizer_in_toy_is_that_of_the_reviews(data):
    tokenizer = make.make_tokenizer(row["text"] for row in data["reviews"])
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TOY / "model").get_vocab()
    words = [*make.ASPECTS, *make.INTENSITY, *make.POSITIVE, *make.NEGATIVE, "the", "was", "and"]
    assert all(len(tokenizer(f" {word}").input_ids) == 1 for word in words)
    assert tokenizer.decode(tokenizer("naïve 🙂 Film").input_ids) == "naïve 🙂 Film"


def test_the_pipeline_s_tokenizer_in_toy_is_that_of_the_prompts():
    tokenizer = make_pipeline.make_tokenizer()
    saved = AutoTokenizer.from_pretrained(TOY / "pipeline" / "tokenizer")
    assert tokenizer.get_vocab() == saved.get_vocab()
    # start, three words, end
    assert {len(tokenizer(prompt).input_ids) for prompt in make_pipeline.PROMPTS} == {5}


# ----------------------------------------------------------------------------- images
def test_the_prompts_are_those_in_toy():
    lines = (TOY / "shapes.txt").read_text().splitlines()
    assert lines == make_pipeline.PROMPTS and len(set(lines)) == 4 * 3


@pytest.mark.parametrize("shape", make_pipeline.SHAPES)
def test_shapes_have_the_same_area_around_their_center_of_mass(shape):
    # the circle's: 8 x 8 x pi = 201.06 square pixels; a square with half a side of 8 has 256
    axis = torch.linspace(-16, 16, 1601)
    x, y = axis[None, :], axis[:, None]
    inside = make_pipeline.is_inside(shape, x, y)
    assert inside.sum().item() * 0.02**2 == pytest.approx(201.06, rel=0.005)
    # a triangle around half of its height is off by a sixth of it, 3.1 pixels
    assert (inside * x).sum().item() / inside.sum() == pytest.approx(0, abs=0.02)
    assert (inside * y).sum().item() / inside.sum() == pytest.approx(0, abs=0.02)


def test_a_triangle_stands_on_its_base():
    # equilateral of area 201.06: 18.66 high, 21.55 wide; y grows downward, from the top at
    # -2/3 x 18.66 = -12.44, so y = -11 is 1.44 x 21.55 / 18.66 = 1.66 wide, and y = 5 is 20.14
    x = torch.linspace(-16, 16, 3201)
    top = make_pipeline.is_inside("triangle", x, torch.tensor(-11.0)).sum().item() / 100
    base = make_pipeline.is_inside("triangle", x, torch.tensor(5.0)).sum().item() / 100
    assert [top, base] == pytest.approx([1.66, 20.14], abs=0.03)


def test_colors_paint_and_place_by_hand():
    image = make_pipeline.draw("a yellow circle", paint=0.5)
    assert image.shape == (3, 32, 32)
    assert image[:, 16, 16].tolist() == [1, 1, 0.5]  # half of the way from white to (1, 1, 0)
    assert image[:, 0, 0].tolist() == [1, 1, 1]
    moved = make_pipeline.draw("a yellow circle", paint=0.5, dx=3.0, dy=-2.0)
    torch.testing.assert_close(moved, image.roll((-2, 3), dims=(1, 2)))


def test_training_images_are_faded_and_differ_in_place():
    torch.manual_seed(0)
    prompts, images = make_pipeline.draw_many(200)
    assert images.shape == (200, 3, 32, 32) and images.max() == 1
    assert set(prompts) == set(make_pipeline.PROMPTS)
    paints = (1 - images.amin((1, 2, 3))) / 2  # each color leaves out one channel or more
    assert 0.3 <= paints.min() < 0.32 and 0.98 < paints.max() <= 1
    darkness = 1 - images.mean(1)
    columns = (darkness.sum(1) * torch.arange(32)).sum(1) / darkness.sum((1, 2)) - 15.5
    assert -3.1 < columns.min() < -2.7 and 2.7 < columns.max() < 3.1
