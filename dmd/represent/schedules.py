"""Numbers that change while a learner learns: pure functions of the step."""

import math


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at a step counted from 0: a linear rise over `warmup`, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """From `first` at step 0 to `last` at the last of `steps`, as half a cosine."""
    part = min(1.0, step / max(1, steps - 1))
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * part))


def ramp(step: int, over: int, first: float, last: float) -> float:
    """From `first` at step 0 linearly to `last` at step `over`, and so on."""
    return first + (last - first) * (min(1.0, step / over) if over else 1.0)
