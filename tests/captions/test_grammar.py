"""Captions by templates: SynCLR's mixture, English, and what users' own concepts may be."""

import json
import re
from collections import Counter

import pytest
import torch

from dmd.captions import concepts, grammar
from dmd.captions.mixture import Mixture
from dmd.data import shapes
from dmd.errors import InputError

SHIPPED = concepts.shipped()


def rows(count, mixture=None, found=SHIPPED, seed=0):
    return grammar.templates(found, mixture or Mixture(), seed)(torch.arange(count))


def test_the_lists_that_ship_are_distinct_and_have_synclrs_weights():
    weights = {g.name: g.weight for g in SHIPPED.groups}
    published = {"food": 0.05, "cars": 0.06, "aircraft": 0.06, "flowers": 0.03, "objects": 0.504, "others": 0.296}
    assert weights == published and sum(weights.values()) == pytest.approx(1.0)
    for group in SHIPPED.groups:
        assert len(group.concepts) >= 30 and len(group.backgrounds) >= 20
    assert min(map(len, (SHIPPED.places, SHIPPED.textures))) > 40 and len(SHIPPED.relations) == 10


def test_the_mixture_is_that_of_the_paper():
    """91 % foreground (44, 11 and 45 % of it), 8.8 % places, 0.2 % textures; five standard deviations are allowed."""
    count = 40_000
    found = Counter(row.template for row in rows(count))
    wanted = {
        "concept": 0.91 * 0.44, "relation": 0.91 * 0.11, "background": 0.91 * 0.45, "place": 0.088, "texture": 0.002,
    }  # fmt: skip
    assert found.keys() == wanted.keys()
    for name, part in wanted.items():
        assert abs(found[name] - count * part) < 5 * (count * part * (1 - part)) ** 0.5


def test_groups_have_their_weights():
    kinds = Counter()
    for row in rows(20_000, Mixture(place=0, texture=0)):
        kinds.update(g.name for g in SHIPPED.groups if row.concept in g.concepts)
    for group in SHIPPED.groups:  # a few concepts ("daisy") are in two groups
        assert kinds[group.name] / 20_000 == pytest.approx(group.weight, abs=0.02)


def test_a_caption_says_its_concept_and_is_one_line_of_english():
    for row in rows(5000):
        assert row.concept in row.caption and row.caption.isprintable() and row.caption == row.caption.strip()
        assert "  " not in row.caption and len(row.caption) < 200 and "{" not in row.caption
        assert not re.search(r"\ba [aeio]|\ban (?!hour)[^aeiou]", row.caption), row.caption


@pytest.mark.parametrize(
    ("noun", "found"),
    [("owl", "an owl"), ("unicycle", "a unicycle"), ("ukulele", "a ukulele"), ("hourglass", "an hourglass"),
     ("the moon", "the moon"), ("umbrella", "an umbrella"), ("horse", "a horse"), ("some rice", "some rice")],
)  # fmt: skip
def test_articles(noun, found):
    assert grammar.with_article(noun) == found


def test_a_caption_depends_on_its_attempt_alone():
    whole = rows(100)
    some = grammar.templates(SHIPPED, Mixture(), 0)(torch.tensor([70, 3, 99]))
    assert some == [whole[70], whole[3], whole[99]]
    assert rows(100, seed=1) != whole


def test_most_captions_are_new():
    assert len({row.caption for row in rows(20_000)}) > 17_000


def test_weighted_choice_has_the_edges_of_a_cumulative_sum():
    weights = (1.0, 0.0, 3.0)
    words = [0, 2**30 - 1, 2**30, 2**32 - 1]
    assert [grammar.weighted(weights, w) for w in words] == [0, 0, 2, 2]


def test_the_world_of_shapes_is_covered_by_its_own_grammar():
    found = grammar.of_shapes(0)(torch.arange(300))
    for row in found:
        scene = shapes.parse(row.caption)
        assert row.concept == " and ".join(f"{t.colour} {t.shape}" for t in scene.things)
        assert row.template == ("place" if len(scene.things) == 1 else "relation")
    assert len({c for row in found for c in row.concept.split(" and ")}) > 40  # of 48


def test_names_come_once():
    found = grammar.of_names(grammar.DIGITS)(torch.arange(12))
    assert [row.caption for row in found[:10]] == [str(i) for i in range(10)] and found[10:] == ["repeated"] * 2


def test_own_concepts_as_text_have_our_backgrounds(tmp_path):
    path = tmp_path / "birds.txt"
    path.write_text("blue tit\n\nowl\nblue tit\n")
    found = concepts.read(path)
    assert found.groups[0].concepts == ("blue tit", "owl") and found.places == SHIPPED.places
    assert {r.concept for r in rows(200, Mixture(place=0, texture=0), found)} == {"blue tit", "owl"}


def test_own_concepts_as_json_may_lack_what_they_do_not_need(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"groups": {"a": {"concepts": ["owl"]}, "b": {"weight": 3, "concepts": ["cat"]}}}))
    found = rows(4000, found=concepts.read(path))
    assert {r.template for r in found} == {"concept"}
    assert Counter(r.concept for r in found)["cat"] / 4000 == pytest.approx(0.75, abs=0.04)


WRONG = {
    "nothing": ("{}", 'has no "groups"'),
    "a list": ("[]", "is not a JSON object"),
    "not JSON": ("{", "is not JSON"),
    "unknown key": ('{"groups": {"a": {"concept": []}}}', "unknown key 'concept'"),
    "no concepts": ('{"groups": {"a": {}}}', 'has no "concepts"'),
    "weight": ('{"groups": {"a": {"concepts": ["x"], "weight": -1}}}', "has the weight -1"),
    "weight is text": ('{"groups": {"a": {"concepts": ["x"], "weight": "1"}}}', "has the weight '1'"),
    "a number": ('{"groups": {"a": {"concepts": [3]}}}', "has '3' among its concepts"),
    "line feed": ('{"groups": {"a": {"concepts": ["x\\ny"]}}}', "among its concepts: each must be text of 1 to 200"),
    "blank": ('{"groups": {"a": {"concepts": [" "]}}}', "among its concepts"),
    "no list": ('{"groups": {"a": {"concepts": "owl"}}}', "has concepts that are no list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_concepts_get_a_sentence(tmp_path, name):
    content, sentence = WRONG[name]
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        concepts.read(path)
    assert str(path) in str(caught.value) and sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "missing.txt", "c.csv"])
def test_missing_concepts_get_a_sentence(tmp_path, name):
    with pytest.raises(InputError, match=name):
        concepts.read(tmp_path / name)


@pytest.mark.parametrize(
    "values", [{"place": -1.0}, {"concept": float("nan")}, {"concept": 0, "relation": 0, "background": 0}]
)
def test_wrong_mixtures_get_a_sentence(values):
    with pytest.raises(InputError, match="mixture"):
        Mixture(**values)
