"""What is done to features before a classifier is fitted to them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scale(NamedTuple):
    """Mean and standard deviation of each feature, (D,) each."""

    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Features (N, D) in units of deviations from the mean."""
        return (x - self.mean) / self.std


def scale_of(x: Tensor) -> Scale:
    """The scale of training features (N, D). A feature that is the same for all images is only centred.

    The published code of SynCLR divides by a deviation of 0 there, and its features become NaN.
    """
    std, mean = torch.std_mean(x, dim=0, correction=0)
    constant = std <= 1e-6 * x.abs().amax(0)
    return Scale(mean, torch.where(constant, torch.ones_like(std), std))
