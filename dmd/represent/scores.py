"""Predictions to figures: accuracy over images or over classes, and their intervals."""

import math

import torch
from torch import Tensor

from dmd.metrics import bootstrap
from dmd.metrics.assess import Figure
from dmd.metrics.bootstrap import NORMAL_95, Statistic, mean_of


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Part of the images, (N,), that are right."""
    return (predicted == labels).double().mean().item()


def mean_class_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the part of their images that are right."""
    return of_classes(predicted == labels, labels)(torch.ones(len(labels), dtype=torch.float64))


def of_classes(right: Tensor, labels: Tensor) -> Statistic:
    """`mean_class_accuracy` of a weighted set; classes of which a resample has nothing do not count in it."""
    classes, number = labels.cpu().unique(return_inverse=True)
    hits = right.cpu().double()

    def statistic(weights: Tensor) -> float:
        total = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, number, weights)
        good = torch.zeros_like(total).index_add_(0, number, weights * hits)
        there = total > 0
        return (good[there] / total[there]).mean().item()

    return statistic


def figure(predicted: Tensor, labels: Tensor, mean_class: bool, resamples: int, seed: int, title: str) -> Figure:
    """A probe's figure on test images with its 95 % interval over them (none with 0 resamples)."""
    right = (predicted == labels).cpu()
    statistic = of_classes(right, labels) if mean_class else mean_of(right)
    value = statistic(torch.ones(len(right), dtype=torch.float64))
    if not resamples:
        return Figure(value)
    return Figure(value, *bootstrap.interval(value, statistic, len(right), resamples, seed, title, (0.0, 1.0)))


def mean_of_tasks(accuracies: Tensor) -> Figure:
    """The mean over tasks, with its 95 % interval over tasks."""
    mean = accuracies.double().mean().item()
    half = NORMAL_95 * accuracies.double().std().item() / math.sqrt(len(accuracies))
    return Figure(mean, max(0.0, mean - half), min(1.0, mean + half))
