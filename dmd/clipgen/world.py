"""The world of shapes as data of CLIP-GEN: drawings without their captions, captioned ones, and scenes to ask for."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmd.data import shapes
from dmd.data.captioned import Captioned
from dmd.data.images import Split
from dmd.data.shapes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene
from dmd.errors import InputError
from dmd.seeding import Stream, as_integers, bits

UNSEEN = 1 << 42
"""Scenes and drawings from this index on are for judging, those below for teaching."""
CAPTIONED = 1 << 40
"""Those from this index on teach the small CLIP; those below are without captions."""
HARD = 3
"""Pairs that differ in a shape, for each that differs in another attribute."""


def drawings(seed: int, first: int, count: int, split: Split) -> tuple[Tensor, list[Scene]]:
    """Drawings (count, 3, 64, 64) uint8 and what they show, from an index on."""
    index = torch.arange(first, first + count)
    scenes = shapes.scenes(seed, index, split)
    return shapes.batch(scenes, seed, index), scenes


def captioned(seed: int, count: int) -> Captioned:
    """Captioned drawings of the train split in pairs (rows 2k and 2k + 1) whose scenes differ in one thing only.

    So a batch of pairs asks for every attribute: without them two things' colours tell most captions apart, and CLIP
    would not have to look at the rest. Pairs of unlike shapes, which are told apart last, come `HARD` times as often.
    """
    index = torch.arange(CAPTIONED, CAPTIONED + -(-count // 2))
    scenes = shapes.scenes(seed, index, "train")
    words = bits(seed, Stream.SHAPES_NEIGHBOUR, 0, index, 2)
    pairs = [(scene, _neighbour(scene, row)) for scene, row in zip(scenes, words, strict=True)]
    both = list(itertools.chain.from_iterable(pairs))
    images = shapes.batch(both, seed, torch.arange(CAPTIONED, CAPTIONED + len(both)))
    return Captioned(images, [shapes.caption(scene) for scene in both])


def _neighbour(scene: Scene, words: Tensor) -> Scene:
    kinds = [kind for attribute, kind in neighbours(scene) if kind for _ in range(HARD if attribute == "shape" else 1)]
    kind = kinds[int(as_integers(words[0], len(kinds)))]
    return kind[int(as_integers(words[1], len(kind)))]


def neighbours(scene: Scene) -> list[tuple[str, list[Scene]]]:
    """All scenes of the train split that differ from this one in one attribute, by attribute; sizes only if named."""
    places = PLACES if len(scene.things) == 1 else RELATIONS
    changes: list[tuple[str, list[dict[str, Any]]]] = [
        ("background", [{"background": b} for b in COLOURS]),
        ("where", [{"where": w} for w in places]),
    ]
    for k, thing in enumerate(scene.things):
        variants = [("shape", [replace(thing, shape=s) for s in SHAPES])]
        variants.append(("colour", [replace(thing, colour=c) for c in COLOURS]))
        if thing.size is not None:
            variants.append(("size", [replace(thing, size=s) for s in SIZES]))
        before, after = scene.things[:k], scene.things[k + 1 :]
        changes += [(name, [{"things": (*before, v, *after)} for v in kind]) for name, kind in variants]
    found = [(name, [s for change in kind for s in _possible(scene, change)]) for name, kind in changes]
    return [(name, [s for s in kind if s != scene and not shapes.held_out(s)]) for name, kind in found]


def _possible(scene: Scene, change: dict[str, Any]) -> list[Scene]:
    try:
        return [replace(scene, **change)]
    except InputError:  # a thing of the background's colour, or two equal things
        return []
