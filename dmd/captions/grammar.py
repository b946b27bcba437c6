"""Captions without a language model: a concept, its background or relation, a place or a texture, in a few words.

The tree is SynCLR's (arXiv 2312.17742, section 3.1, and the released synthesize_text.py): 91 % of the captions have a
concept (alone 44 %, with a relation 11 %, with a background 45 %), 8.8 % a place only, 0.2 % a texture only. Plain
strings of this kind reach 78.7 % on ImageNet there, 0.1 less than the final captions of a language model.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from dmd.captions.concepts import Concepts
from dmd.captions.mixture import Mixture
from dmd.data import shapes
from dmd.seeding import Stream, bits

Template = Literal["concept", "relation", "background", "place", "texture"]
WORDS = 10  # random 32-bit words of a caption


class Row(NamedTuple):
    """A caption and where it comes from."""

    caption: str
    concept: str
    template: str


class Idea(NamedTuple):
    """What a caption shall be about; `detail` is its background, or its relation and the other thing."""

    template: Template
    concept: str
    detail: str = ""
    other: str = ""


Draw = Callable[[Tensor], Sequence[Row | str]]
"""Attempts (B,) int64 to a caption each, or in one word why there is none."""

SHOTS = (
    "", "", "", "", "a photo of ", "a photo of ", "a close-up photo of ", "a cropped photo of ", "a bright photo of ",
    "a dark photo of ", "a black and white photo of ", "a blurry photo of ", "an old photograph of ", "a painting of ",
    "a pencil sketch of ", "a wide shot of ", "an illustration of ", "a low-angle photo of ",
)  # fmt: skip
LOOKS = (
    "", "", "", "", "", "", "", "small ", "large ", "beautiful ", "colourful ", "single ", "strange ", "shiny ",
    "well-lit ", "tiny ",
)  # fmt: skip
LIGHTS = (
    "", "", "", "", "", "", "", "", ", early in the morning", ", at sunset", ", at night", ", in bright daylight",
    ", in soft light", ", under an overcast sky", ", in winter", ", in summer", ", shallow depth of field",
    ", high contrast", ", muted colours", ", highly detailed",
)  # fmt: skip
VIEWS = (
    "", "a view of ", "a photo of ", "a wide-angle photo of ", "an aerial photo of ", "a postcard of ",
    "a painting of ", "the inside of ", "a corner of ", "an empty view of ",
)  # fmt: skip
CROWDS = ("", "", "", " with a few people", " without anybody", " full of visitors", " in the rain", " under snow")
SURFACES = (
    "a {} texture", "a {} surface", "a close-up of a {} surface", "a {} pattern", "a photo of a {} material",
    "a {} fabric", "a {} wall", "a macro photo of something {}", "a {} background", "a sheet of {} paper",
)  # fmt: skip


def chosen(names: Sequence[str], word: int) -> str:
    """One of some names, all equally likely, by a random 32-bit word."""
    return names[len(names) * word >> 32]


def weighted(weights: Sequence[float], word: int) -> int:
    """A number with probability in proportion to its weight, by a random 32-bit word."""
    point = (word + 0.5) * 2.0**-32 * sum(weights)
    return next((i for i, edge in enumerate(itertools.accumulate(weights)) if point < edge), len(weights) - 1)


def with_article(noun: str) -> str:
    """ "owl" to "an owl"; what begins with an article or a quantity stays."""
    first = noun.split()[0].lower()
    if first in ("a", "an", "the", "some", "two", "three", "several"):
        return noun
    vowel = first[0] in "aeiou" and not first.startswith(("uni", "uku", "eu", "one", "use"))
    return f"{'an' if vowel or first.startswith(('hour', 'honest', 'heir')) else 'a'} {noun}"


def idea(concepts: Concepts, mixture: Mixture, words: Sequence[int]) -> Idea:
    """What a caption is about, from seven random words. A template that has no list to draw from gives way to the
    others, and a concept without backgrounds stands alone."""
    tops = (mixture.foreground, mixture.place if concepts.places else 0, mixture.texture if concepts.textures else 0)
    top = weighted(tops if sum(tops) else (1.0, 0.0, 0.0), words[0])
    if top == 1:
        return Idea("place", chosen(concepts.places, words[1]))
    if top == 2:
        return Idea("texture", chosen(concepts.textures, words[1]))
    group = concepts.groups[weighted([g.weight for g in concepts.groups], words[1])]
    concept = chosen(group.concepts, words[2])
    lists = (mixture.concept, mixture.relation if concepts.relations else 0)
    kinds = (*lists, mixture.background if group.backgrounds else 0)
    kind = weighted(kinds if sum(kinds) else (1.0, 0.0, 0.0), words[3])
    if kind == 1:
        other = concepts.groups[weighted([g.weight for g in concepts.groups], words[4])]
        return Idea("relation", concept, chosen(concepts.relations, words[5]), chosen(other.concepts, words[6]))
    if kind == 2:
        return Idea("background", concept, chosen(group.backgrounds, words[4]))
    return Idea("concept", concept)


def phrase(what: Idea, words: Sequence[int]) -> str:
    """An idea in words, from three random words."""
    if what.template == "texture":
        text = chosen(SURFACES, words[0])
        return (text.replace("a {}", "an {}") if what.concept[0] in "aeiou" else text).format(what.concept)
    if what.template == "place":
        place = f"{chosen(VIEWS, words[0])}{with_article(what.concept)}"
        return f"{place}{chosen(CROWDS, words[1])}{chosen(LIGHTS, words[2])}"
    look = chosen(LOOKS, words[1])
    text = with_article(look + what.concept) if with_article(what.concept) != what.concept else what.concept
    if what.template == "relation":
        text = f"{text} {what.detail} {with_article(what.other)}"
    if what.template == "background":
        text = f"{text} {what.detail}"
    return f"{chosen(SHOTS, words[0])}{text}{chosen(LIGHTS, words[2])}"


def templates(concepts: Concepts, mixture: Mixture, seed: int) -> Draw:
    """Captions by templates, each a function of the seed and its attempt alone."""

    def draw(attempts: Tensor) -> list[Row | str]:
        rows: list[Row | str] = []
        for words in bits(seed, Stream.CAPTION, 0, attempts, WORDS).tolist():
            about = idea(concepts, mixture, words)
            rows.append(Row(phrase(about, words[7:]), about.concept, about.template))
        return rows

    return draw


def of_shapes(seed: int) -> Draw:
    """Captions of the world of shapes (`dmd.data.shapes`), whose concepts are coloured shapes."""

    def draw(attempts: Tensor) -> list[Row | str]:
        return [
            Row(
                shapes.caption(scene),
                " and ".join(f"{t.colour} {t.shape}" for t in scene.things),
                "place" if len(scene.things) == 1 else "relation",
            )
            for scene in shapes.scenes(seed, attempts)
        ]

    return draw


def of_names(names: Sequence[str]) -> Draw:
    """The names of classes, each once: what a class-conditional network is asked."""

    def draw(attempts: Tensor) -> list[Row | str]:
        return [Row(names[i], names[i], "class") if i < len(names) else "repeated" for i in attempts.tolist()]

    return draw


DIGITS = tuple("0123456789")
"""The classes of `digits`."""
