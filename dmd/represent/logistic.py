"""Multinomial logistic regression by L-BFGS, along a path of regularisations.

The fine-grained protocol of SynCLR (arXiv 2312.17742, appendix) and of Ericsson et al. 2021 (arXiv 2011.13377): 45
values of l2 between 1e-6 and 1e5, the best on validation images, refitted on training and validation images together.
The objective is scikit-learn's with C = 1 / l2: sum of cross-entropies + l2 / 2 * |W|^2, without a penalty on the bias.
SciPy's L-BFGS-B takes the steps; the objective is evaluated in float64 on the features' device.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

REGULARISATIONS = tuple(torch.logspace(5, -6, 45, dtype=torch.float64).tolist())
"""l2 from the strongest to the weakest, so that each fit begins where the one before has ended."""

FLAT = 64 * 2.0**-52
"""Relative change of the objective at which there is nothing left to gain, as scikit-learn has it."""


class Fit(NamedTuple):
    """A linear classifier.

    Attributes:
        l2: its regularisation.
        weight, bias: (K, D) and (K,) float64.
        gradient: largest part of the objective's gradient by image, which tells whether it has converged.
    """

    l2: float
    weight: Tensor
    bias: Tensor
    gradient: float

    def predict(self, x: Tensor) -> Tensor:
        """Features (N, D) to classes, int64 (N,)."""
        return torch.addmm(self.bias, x.double(), self.weight.T).argmax(1)


def path(
    x: Tensor, labels: Tensor, classes: int, l2s: Sequence[float] = REGULARISATIONS, iterations: int = 1000,
    tolerance: float = 1e-5,
) -> Iterator[Fit]:  # fmt: skip
    """A fit for each l2, in their order, each from the solution before.

    Args:
        x: features (N, D), as a rule standardised.
        labels: int64 (N,) in [0, classes).
        classes: K.
        l2s: above 0.
        iterations: of L-BFGS, at most, for each.
        tolerance: it stops where no part of the gradient by image is larger.

    Raises:
        ArithmeticError: a fit is not finite.
    """
    from scipy.optimize import minimize

    data, count, shape = x.double(), len(x), (classes, x.shape[1] + 1)
    parameters = np.zeros(shape[0] * shape[1])
    for l2 in l2s:

        @torch.enable_grad()
        def objective(flat: NDArray[np.float64], l2: float = l2) -> tuple[float, NDArray[np.float64]]:
            whole = torch.from_numpy(flat).reshape(shape).to(data.device).requires_grad_()
            weight, bias = whole[:, :-1], whole[:, -1]
            loss = F.cross_entropy(torch.addmm(bias, data, weight.T), labels) + l2 / (2 * count) * weight.square().sum()
            (gradient,) = torch.autograd.grad(loss, whole)
            return loss.item(), gradient.flatten().cpu().numpy()

        found = minimize(
            objective, parameters, method="L-BFGS-B", jac=True,
            options={"maxiter": iterations, "gtol": tolerance, "ftol": FLAT, "maxls": 50, "maxfun": 10 * iterations},
        )  # fmt: skip
        if not np.isfinite(found.fun):
            raise ArithmeticError(f"logistic regression with l2 {l2:g} is not finite: the features are too large")
        parameters = found.x
        solution = torch.from_numpy(parameters.copy()).reshape(shape).to(data.device)
        yield Fit(l2, solution[:, :-1].contiguous(), solution[:, -1].contiguous(), float(np.abs(found.jac).max()))
