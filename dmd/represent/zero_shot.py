"""Zero-shot classification: an image has the class whose prompts its embedding is nearest to.

Each class is written into several templates; the normalised embeddings of its prompts are averaged and normalised
again (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.errors import InputError

TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of the {}")
"""What names are written into where nobody says otherwise."""

EmbedTexts = Callable[[Sequence[str]], Tensor]
"""Prompts to embeddings (P, D)."""


def check_templates(templates: Sequence[str]) -> None:
    """Raises InputError for a template without exactly one {}."""
    if not templates:
        raise InputError("there are no templates: give at least one with {} where the class belongs")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"the template {template[:100]!r} must have {{}} once, where the class belongs")


@torch.no_grad()
def class_embeddings(embed: EmbedTexts, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Unit vectors of the classes, float32 (K, D).

    Raises:
        InputError: a template has no place for the class.
    """
    check_templates(templates)
    names = [name.replace("_", " ") for name in classes]
    prompts = [template.replace("{}", name) for name in names for template in templates]
    found = F.normalize(embed(prompts).float(), dim=1).unflatten(0, (len(names), len(templates)))
    return F.normalize(found.mean(1), dim=1)


@torch.no_grad()
def predict(images: Tensor, classes: Tensor) -> Tensor:
    """The class of each image, int64 (N,).

    Args:
        images: embeddings (N, D), of any length.
        classes: unit vectors (K, D).
    """
    return (images.float() @ classes.to(images.device).T).argmax(1)
