"""The architecture, read from the sources: imports point downwards only, and the method knows no files or networks."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    # know no diffusion
    {"__init__", "shipped", "errors", "config", "settings", "seeding", "ema", "checkpoint", "log", "locks", "sharding"},
    {"noise", "denoiser", "mixture", "run", "chance", "processes", "allocator"},
    {"solvers", "losses", "pairs", "codec", "shards"},
    {"distill", "generate", "batches", "teach", "pipeline", "online"},
    {"teachers", "metrics", "data", "captions", "report", "plots", "scoreboard"},  # the rim: each may be replaced
    {
        "build",
        "chain",
        "evaluation",
        "ranking",
        "teach_miniature",
        "teach_shapes",
        "teach_folder",
        "clipgen",
        "represent",
        "synthesis",
        "sampled",
    },
    {"cli", "__main__"},
]
"""Modules and packages of dmd, lowest first. A module imports its own layer and lower ones, and never in a circle."""

HEAVY = {
    "diffusers",
    "transformers",
    "lpips",
    "cleanfid",
    "torchvision",
    "accelerate",
    "matplotlib",
    "sklearn",
    "timm",
    "peft",
    "vector_quantize_pytorch",
    "open_clip",
}
"""Imported inside the function that uses them, so that commands which do without start fast and need no extras."""


def module_of(path):
    """The module or package of dmd that a file belongs to: dmd/metrics/frechet.py is of `metrics`."""
    return path.relative_to(ROOT / "dmd").parts[0].removesuffix(".py")


def imports_of(path):
    """(absolute dotted name, whether it is inside a function) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import: write it from dmd"
            found += [(f"{node.module}.{alias.name}", node in inner) for alias in node.names]
    return found


SOURCES = sorted((ROOT / "dmd").rglob("*.py"))
MODULES = {module_of(p) for p in SOURCES}
IMPORTS = {(name, inside, path) for path in SOURCES for name, inside in imports_of(path)}


def own(name):
    """The module of dmd that an import is from; None for other packages. `import dmd` and its version are __init__."""
    package, _, rest = name.partition(".")
    if package != "dmd":
        return None
    first = rest.split(".")[0]
    return first if first in MODULES else "__init__"


EDGES = {(module_of(path), own(name)) for name, _, path in IMPORTS if own(name)}


def targets(module):
    return {b for a, b in EDGES if a == module and b != module}


def externals(module):
    """Packages beside dmd and the standard library that a module imports anywhere."""
    tops = {name.split(".")[0] for name, _, path in IMPORTS if module_of(path) == module}
    return tops - {"dmd"} - set(sys.stdlib_module_names)


def test_every_module_has_a_layer():
    listed = set().union(*LAYERS)
    unlisted = sorted(MODULES - listed)
    assert not unlisted, (
        f"dmd/{unlisted[0]} has no layer: add it to LAYERS in tests/test_layers.py, above everything that it imports"
    )
    assert sum(map(len, LAYERS)) == len(listed)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    layer = {m: i for i, modules in enumerate(LAYERS) for m in modules}
    upwards = sorted(t for t in targets(module) if layer.get(t, -1) > layer.get(module, len(LAYERS)))
    assert not upwards, f"dmd/{module} imports dmd/{upwards[0]}, which is a layer above it"


def test_imports_have_no_circle():
    graph = {m: targets(m) for m in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", ["noise", "denoiser", "losses", "solvers", "mixture"])
def test_the_mathematics_knows_tensors_only(module):
    assert externals(module) <= {"torch", "einops"}
    assert targets(module) <= {"noise", "denoiser", "losses", "solvers"}
    assert not {name.split(".")[0] for name, _, path in IMPORTS if module_of(path) == module} & {
        "pathlib", "os", "json", "io", "subprocess",
    }  # fmt: skip


METHOD = {
    "batches",
    "build",
    "chance",
    "checkpoint",
    "config",
    "data",
    "ema",
    "errors",
    "evaluation",
    "log",
    "metrics",
    "plots",
    "processes",
    "report",
    "run",
    "seeding",
    "settings",
    "teachers",
}
"""What another method on the same loop may know."""

ALLOWED = {
    "distill": {"denoiser", "losses", "solvers", "ema"},
    "run": {"checkpoint", "log", "errors", "sharding"},
    "teachers": {"noise", "denoiser", "solvers", "codec", "checkpoint", "errors", "pipeline", "shipped"},
    "metrics": {"__init__", "data", "checkpoint", "log", "errors", "seeding"},
    "data": {"errors", "seeding", "log", "shards"},
    "captions": {"data", "seeding", "errors", "checkpoint", "locks"},
    "shards": {"checkpoint", "errors"},
    "pairs": {"checkpoint", "seeding", "errors"},
    "report": {"config", "log", "errors", "plots", "settings"},
    "plots": set(),
    "clipgen": METHOD | {"shipped"},
    "represent": METHOD | {"generate", "online", "scoreboard", "shards", "synthesis"},
    "scoreboard": {"plots"},
}
"""Contracts that are narrower than the layers."""


@pytest.mark.parametrize("module", ALLOWED)
def test_a_contract_between_parts_holds(module):
    surplus = sorted(targets(module) - ALLOWED[module])
    assert not surplus, f"dmd/{module} imports dmd/{surplus[0]}, which it should not know"


def test_an_iteration_knows_no_process_file_or_text():
    names = {name.split(".")[0] for name, _, path in IMPORTS if module_of(path) == "distill"}
    assert names <= {"collections", "dataclasses", "dmd", "torch", "typing"}


@pytest.mark.parametrize("package", sorted(HEAVY))
def test_heavy_packages_are_imported_where_they_are_used(package):
    early = {
        module_of(path)
        for name, inside, path in IMPORTS
        if name.split(".")[0] == package and not inside and module_of(path) not in ("run", "build", "chain")
    }
    assert not early, f"dmd/{min(early)} imports {package} at its top: import it inside the function that uses it"


def test_configs_and_flags_can_be_read_without_torch():
    """`--help`, `--dry-run` and the report of a finished run import none of the networks' machinery."""
    light = {"config", "settings", "errors", "log", "report", "plots", "cli", "__main__", "__init__"}
    early = {(module_of(p), n.split(".")[0]) for n, inside, p in IMPORTS if not inside and module_of(p) in light}
    assert not {e for e in early if e[1] in HEAVY | {"torch", "safetensors", "numpy"}}


@pytest.mark.parametrize(
    "command",
    [
        ["train_dmd.py"], ["sample.py"], ["-m", "dmd"], ["-m", "dmd", "teach"], ["-m", "dmd", "pairs"],
        ["-m", "dmd", "evaluate"], ["-m", "dmd", "clipgen", "train"], ["-m", "dmd", "captions"],
        ["-m", "dmd", "synthesize"], ["-m", "dmd", "probe"], ["-m", "dmd", "represent"],
        ["-m", "dmd", "represent", "stablerep"],
    ],
    ids=str,
)  # fmt: skip
def test_help_answers_without_torch(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "usage" in done.stdout.lower()
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "dmd" in imported
    assert not imported & (HEAVY | {"torch", "numpy", "safetensors"})


@pytest.mark.parametrize("script", ["train_dmd.py", "sample.py"])
def test_scripts_are_thin(script):
    assert {own(name) for name, _ in imports_of(ROOT / script)} <= {"cli", None}


def test_the_method_can_be_read_in_an_hour():
    """noise, denoiser, losses, distill: the reading order for a newcomer, with the script under 600 lines."""
    files = [ROOT / "dmd" / f"{m}.py" for m in ("noise", "denoiser", "losses", "distill")] + [ROOT / "train_dmd.py"]
    assert sum(len(f.read_text().splitlines()) for f in files) < 600
