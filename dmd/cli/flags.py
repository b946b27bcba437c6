"""Command lines to configs: `[PRESET] [--flags]`, one flag per field of `dmd.config.Config`."""

import contextlib
import io
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from dmd.config import PRESETS, Config, check, preset
from dmd.errors import InputError
from dmd.settings import to_json

C = TypeVar("C")


@dataclass(frozen=True)
class Command(Generic[C]):
    """A config, and what to do with it."""

    config: C
    fresh: bool = False
    """Delete what the run directory holds and start over; what is cached stays."""
    dry_run: bool = False
    """Print the resolved config and stop."""


def parse(argv: Sequence[str], prog: str, description: str, default: str = "shapes") -> Command[Config]:
    """The flags of distillation, see `over_preset`."""
    return over_preset(argv, prog, description, PRESETS, preset, check, default)


def over_preset(
    argv: Sequence[str], prog: str, description: str, presets: Iterable[str], preset: Callable[[str], C],
    check: Callable[[C], None], default: str = "shapes",
) -> Command[C]:  # fmt: skip
    """Flags over a preset (the first argument, or `default`).

    Args:
        presets: their names.
        preset: the config of one; raises InputError if there is no such.
        check: raises InputError for values out of range.

    Raises:
        InputError: unknown preset or flag, or a value that is out of range or of another kind.
        SystemExit: with code 0 for --help.
    """
    rest = list(argv)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else default
    config: Any = preset(name)
    kind: Any = tyro.conf.OmitArgPrefixes[Annotated[Command[type(config)], tyro.conf.arg(name="")]]  # type: ignore[misc]
    text = f"{description}\n\nPresets: {', '.join(presets)}. The defaults below are those of {name!r}."
    command = read(kind, rest, f"{prog} [PRESET]", default=Command(config), description=text)
    check(command.config)
    return replace(command, config=replace(command.config, preset=name))


def read(kind: Any, argv: Sequence[str], prog: str, **options: Any) -> Any:
    """`tyro.cli`, except that what it draws as a box of several lines becomes an InputError of one sentence."""
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            return tyro.cli(kind, args=list(argv), prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    _, *rows = re.sub(r"\x1b\[[0-9;]*m", "", drawn.getvalue()).splitlines()  # without the title
    parts = [" ".join(row.strip(" │|") for row in part) for rule, part in itertools.groupby(rows, _is_rule) if not rule]
    raise InputError(f"{parts[0].rstrip('.') if parts else 'the command line is wrong'}; see {prog} --help")


def _is_rule(row: str) -> bool:
    return not row.strip(" │|─-╰╯+")


Work = Callable[[Config], None]
"""What a command does with its config."""


def show(config: Any) -> None:
    """Print a config as JSON."""
    print(json.dumps(to_json(config), indent=2))


def guarded(work: Callable[[], object]) -> None:
    """Run a command: InputError and full or read-only disks become one sentence and exit code 2; the package's own
    warnings become one sentence each."""
    warnings.formatwarning = _plain
    try:
        work()
    except InputError as error:
        _fail(str(error), 2)
    except ArithmeticError as error:  # dmd.run.NotFinite, without importing torch for `--help`
        _fail(str(error), 1)
    except BrokenPipeError:
        sys.exit(1)  # the reader of our output has gone, as in `... | head`
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        name = error.filename or "the disk"
        _fail(f"{name}: {error.strerror}; give a folder that can be read and written and has space", 2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)


def _plain(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:  # fmt: skip
    """A warning of this package as a sentence, one of a library as Python prints it."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {' '.join(str(message).split())}\n"
    return FORMATTED(message, category, filename, lineno, line)


FORMATTED = warnings.formatwarning


def _fail(sentence: str, code: int) -> None:
    """Say why. If the first process fails, too, only it does: a launcher ends all others as soon as one exits."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(ALONE)
    who = "" if rank == "0" else f" (process {rank})"
    print(f"error{who}: " + " ".join(sentence.split()), file=sys.stderr, flush=True)
    sys.exit(code)


ALONE = 1.0
"""After so many seconds a process that has failed is the only one, or the first has failed long ago."""
