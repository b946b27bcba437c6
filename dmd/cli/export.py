"""`dmd export`: a student as another folder for diffusers, or as one file for ComfyUI and A1111."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dmd import shipped
from dmd.cli.flags import guarded, read
from dmd.errors import InputError


@dataclass(frozen=True)
class ExportOptions:
    """Export a student that draws from text: to a folder for diffusers, or to one file for ComfyUI and A1111."""

    student: Annotated[str, tyro.conf.Positional]
    """Folder of the student, as a run writes it, or shapes-student, which ships."""
    out: str
    """A new folder, or a new file whose name ends in .safetensors."""
    single_file: bool = False
    """One file for ComfyUI and A1111; so it is as well without this flag where --out ends in .safetensors."""
    half: bool = False
    """Weights in float16: half the size."""


def main(argv: Sequence[str], prog: str = "dmd export") -> None:
    guarded(lambda: export(read(ExportOptions, argv, prog)))


def export(options: ExportOptions) -> None:
    """Write the folder or file and say where it is. Raises InputError if something is there already."""
    student, out = Path(shipped.resolve(options.student)), Path(options.out)
    if not student.is_dir():
        raise InputError(f"{student} is no folder: give the folder of a student")
    if out.exists():
        raise InputError(f"{out} exists already: give another --out")
    if options.single_file and out.suffix != ".safetensors":
        raise InputError(f"--out is {out}: with --single-file its name must end in .safetensors")
    from dmd.teachers import export

    if out.suffix == ".safetensors":
        export.single_file(student, out, half=options.half)
    else:
        export.convert_student(student, out, half=options.half)
    print(f"exported: {out}")
