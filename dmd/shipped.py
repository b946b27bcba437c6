"""Networks that come with the package, known by name: "shapes-teacher", "shapes-student", "shapes-features"."""

from pathlib import Path

FOLDER = Path(__file__).parent / "models"


def resolve(source: str | Path) -> str | Path:
    """The folder of a network that ships, if `source` names one and there is no folder of the user's by that name."""
    folder = FOLDER / source
    return folder if folder.parent == FOLDER and folder.is_dir() and not Path(source).exists() else source
