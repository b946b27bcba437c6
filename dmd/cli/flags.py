"""Command lines to configs: `[PRESET] [--flags]`, one flag per field of `dmd.config.Config`."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from dmd.config import PRESETS, Config, check, preset, to_json
from dmd.errors import InputError


@dataclass(frozen=True)
class Command:
    """A config, and what to do with it."""

    config: Config
    fresh: bool = False
    """Delete what the run directory holds and start over."""
    dry_run: bool = False
    """Print the resolved config and stop."""


def parse(argv: Sequence[str], prog: str, description: str) -> Command:
    """Flags over a preset (the first argument, or `digits`).

    Raises:
        InputError: unknown preset or a value out of range.
        SystemExit: with code 2 for unknown flags, 0 for --help.
    """
    rest = list(argv)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "digits"
    kind: Any = tyro.conf.OmitArgPrefixes[Annotated[Command, tyro.conf.arg(name="")]]
    text = f"{description}\n\nPresets: {', '.join(PRESETS)}. The defaults below are those of {name!r}."
    command = tyro.cli(kind, args=rest, default=Command(preset(name)), prog=f"{prog} [PRESET]", description=text)
    check(command.config)
    return replace(command, config=replace(command.config, preset=name))


Work = Callable[[Config], None]
"""What a command does with its config."""


def show(config: Config) -> None:
    """Print a config as JSON."""
    print(json.dumps(to_json(config), indent=2))


def guarded(work: Callable[[], object]) -> None:
    """Run a command: InputError and full or read-only disks become one sentence and exit code 2."""
    try:
        work()
    except InputError as error:
        _fail(str(error))
    except ArithmeticError as error:  # dmd.run.NotFinite, without importing torch for `--help`
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)  # the reader of our output has gone, as in `... | head`
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}; give a folder that can be written to and has space")
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
