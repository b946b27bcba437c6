"""What ships: a miniature teacher and the student distilled from it; and where a student's teacher is."""

import json
from pathlib import Path

from dmd.config import preset
from dmd.errors import InputError

FOLDER = Path(__file__).parent
TEACHER, STUDENT, FEATURES = (FOLDER / f"shapes-{kind}" for kind in ("teacher", "student", "features"))
EXAMPLE = "a small red circle at the left on a blue background"


def locate(name: str, kind: str) -> str:
    """A folder or hub id; "shapes" is the model that ships, a "student" or a "teacher"."""
    return str(FOLDER / f"shapes-{kind}") if name == "shapes" else name


def teacher_of(student: str | Path) -> tuple[str, float]:
    """A student's teacher and the guidance scale that it was distilled with, from the run that the student lies in.

    Raises:
        InputError: the folder is not in a run directory.
    """
    if Path(student) == STUDENT:
        return str(TEACHER), preset("shapes").pairs.guidance
    run = Path(student).resolve().parent
    try:
        guidance = json.loads((run / "config.json").read_text(encoding="utf-8"))["pairs"]["guidance"]
        teacher = json.loads((run / "summary.json").read_text(encoding="utf-8"))["teacher"]["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{student} is not in a finished run, so its teacher is not known: give the teacher's folder as --student "
            "with --steps 50"
        ) from None
    return str(teacher), float(guidance)
