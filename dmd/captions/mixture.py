"""How often each template is taken; apart, so that flags are read without torch."""

from dataclasses import dataclass

from dmd.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """Parts of the templates: relative weights in two levels. The defaults are SynCLR's.

    Raises:
        InputError: a part is negative, or all of a level are 0.
    """

    foreground: float = 0.91
    """Of captions with a concept, against --place and --texture."""
    place: float = 0.088
    """Of captions of a place only."""
    texture: float = 0.002
    """Of captions of a texture only."""
    concept: float = 0.44
    """Of the foreground: the concept alone."""
    relation: float = 0.11
    """Of the foreground: a concept in a relation to another thing."""
    background: float = 0.45
    """Of the foreground: a concept and a background."""

    def __post_init__(self) -> None:
        values = vars(self)
        wrong = [k for k, v in values.items() if not 0 <= v < float("inf")]
        if wrong:
            raise InputError(f"--{wrong[0]} is {values[wrong[0]]}: a part of the mixture must be a number of 0 or more")
        if self.foreground + self.place + self.texture <= 0 or self.concept + self.relation + self.background <= 0:
            raise InputError("the mixture's parts are all 0: at least one template must have a part")
