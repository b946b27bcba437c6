"""The performance targets P1 to P8, a line each beside its target: `python -m benchmarks.all [--quick]`.

P1  what our one-step sampler adds to bare calls of the same networks
P2  error of x0 from half-precision networks, against the formula in float64, data of std 0.9
P3  one step against 50 guided steps, from prompt to image, at the size of Stable Diffusion 1.5
P4  time of one image of 512 x 512 pixels on the CPU
P5  images per second of one core: JPEG, and whole shards; a data set's rate beside its generator's
P6  the network calls of a training step over the whole step; on a GPU the model FLOPs utilisation at that size
P7  network calls in a training step
P8  Fréchet distance in 2048 dimensions: processor time of one thread, and its difference from clean-fid's

P3 and P4 run networks of full size with random weights; the 50 steps are extrapolated from one, and say so. `--small`
takes small networks for them, and then compares nothing with the targets. P5, P6 and P7 are figures of other
benchmarks, which run in processes of their own.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, sampling
from benchmarks.common import finish, say_machine
from dmd import shipped
from dmd.denoiser import NetworkDenoiser, epsilon
from dmd.metrics.frechet import frechet_distance, moments
from dmd.noise import DDPM
from dmd.solvers import one_step
from dmd.teachers.stable_diffusion import TimestepNet

STEPS = 50
DIMENSIONS, SAMPLES = 2048, 3000
LARGE = (
    "sd15", "--random", "--mixed-precision", "bf16", "--batch-size", "16", "--pair-batch-size", "8",
    "--gradient-accumulation-steps", "1", "--pair-accumulation-steps", "2", "--no-gradient-checkpointing",
    "--no-checkpoint-decoder",
)  # fmt: skip
"""A training step at the size of Stable Diffusion 1.5 that a GPU of 80 GB holds."""


@dataclass(frozen=True)
class Line:
    """A figure beside its target.

    Attributes:
        target: the bound; None where a figure is for information.
        least: the target is the least good value, not the largest.
        note: what to know about the figure.
    """

    name: str
    what: str
    value: float | None
    unit: str
    target: float | None
    least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing can be compared."""
        if self.value is None or self.target is None:
            return None
        return self.value >= self.target if self.least else self.value <= self.target

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g} {self.unit}"
        bound = "" if self.target is None else f"{'>=' if self.least else '<='} {self.target:g} {self.unit}"
        verdict = {True: "met", False: "MISSED", None: "-"}[self.met]
        return f"{self.name}  {self.what:44} {value:>18}   {bound:18} {verdict:7} {self.note}".rstrip()


# ----------------------------------------------------------------------------- P1, P3, P4


def sampler(runs: int) -> list[Line]:
    """P1 of the miniature that ships: a network call costs some milliseconds there, so all else shows."""
    parts = sampling.read_parts(Path(shipped.resolve("shapes-student")), torch.float32, torch.device("cpu"))
    lines = []
    for batch in (1, 16):
        todo = sampling.works(parts, batch, 1)
        names = [f"{kind}, {codec}" for codec in parts.codecs for kind in ("one step", "bare calls")]
        found = sampling.measure({name: todo[name] for name in names}, runs)
        lines += [
            Line("P1", f"sampler over bare calls, miniature, {batch}, {codec}", 100 * _added(found, codec), "%", 5)
            for codec in parts.codecs
        ]
    return lines


def _added(found: Mapping[str, sampling.Measured], codec: str) -> float:
    pairs = zip(found[f"one step, {codec}"].seconds, found[f"bare calls, {codec}"].seconds, strict=True)
    return statistics.median(a / b for a, b in pairs) - 1.0


def speed(runs: int, small: bool, dtype: torch.dtype) -> list[Line]:
    """P1 at full size, P3 and P4, on a GPU if there is one; P4 is of CPUs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = sampling.random_parts(sampling.SMALL if small else sampling.SD_1_5, dtype, device)
    todo = sampling.works(parts, 1, 1)
    kinds = ("one step", "bare calls", "teacher")
    wanted = ["guided steps", *(f"{kind}, {codec}" for codec in parts.codecs for kind in kinds)]
    found = sampling.extrapolated(
        sampling.measure({n: todo[n] for n in wanted}, runs, warm_up=int(device.type == "cuda")), STEPS
    )
    note = f"{STEPS} steps extrapolated from 1, {str(dtype).removeprefix('torch.')}"
    rate = common.matmul_rate(device, dtype)
    lines = []
    for codec, least, most in (("full", 24.0, 3.4), ("tiny", 80.0, 1.3)):
        one, many = found[f"one step, {codec}"].seconds, found[f"teacher, {codec}"].seconds
        ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
        lines.append(Line("P3", f"speedup, {codec} decoder", ratio, "x", None if small else least, True, note))
        compared = None if small or device.type == "cuda" else most
        floor = found[f"one step, {codec}"].flops / rate
        which = f"; the target is of CPUs with AMX, which this one {'has' if _has_amx() else 'has not'}"
        bound = which if compared else ""
        text = f"its arithmetic takes {floor:.3g} s at this machine's {rate / 1e9:.0f} GFLOP/s{bound}"
        lines.append(Line("P4", f"one image, {codec} decoder", statistics.median(one), "s", compared, note=text))
        if not small:
            lines.append(
                Line("P1", f"sampler over bare calls, 512 pixels, {codec}", 100 * _added(found, codec), "%", 2)
            )
    return sorted(lines, key=lambda line: line.name)


# ----------------------------------------------------------------------------- P2


class Knowing(nn.Module):
    """A UNet that answers with given noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = nn.Parameter(noise, requires_grad=False)

    def forward(self, x_t: Tensor, index: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.noise,)


def precision() -> list[Line]:
    """P2: the network's noise is rounded, everything after it is ours."""
    schedule, shape = DDPM(), (16, 4, 64, 64)
    draw = torch.Generator().manual_seed(0)
    z, x0 = torch.randn(shape, generator=draw), 0.9 * torch.randn(shape, generator=draw).double()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).prod()
    exact = (z - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    lines = []
    for dtype, target in ((torch.bfloat16, 0.025), (torch.float16, 0.0031)):
        net = TimestepNet(Knowing(exact.to(dtype)), schedule)
        found = one_step(NetworkDenoiser(net, schedule, epsilon), z, {"text": torch.zeros(16, 77, 16)})
        error = (found - x0).square().mean().sqrt().item()
        lines.append(Line("P2", f"error of x0, {str(dtype).removeprefix('torch.')}", error, "rms", target))
    return lines


# ----------------------------------------------------------------------------- P5, P6, P7


def other(name: str, *arguments: str) -> dict[str, Any]:
    """The results of another benchmark, from its last line. Ends the program with a sentence if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        sys.exit(f"error: python -m benchmarks.{name} {' '.join(arguments)} failed: {why}")
    return json.loads(done.stdout.strip().splitlines()[-1])["results"]


def writing(quick: bool) -> list[Line]:
    """P5."""
    found = other("dataset", "--only", "encode", "writer", "throughput", *["--quick"] * quick)
    written, rates = found["writer"]["images_per_second_per_core"], found["throughput"]
    free = found["free_cores"] > 0
    note = f"of {rates['bare']:.0f} images/s" + ", but no core is free for writing" * (not free)
    return [
        Line("P5", "JPEG q95 of 512 pixels, one core", found["encode"]["encode_per_core"], "images/s", 500, True),
        Line("P5", "to whole shards, one core", written, "images/s", 150, True),
        Line("P5", "data set over bare generator", rates["part"], "", 0.95 if free else None, True, note),
    ]


def training(quick: bool) -> list[Line]:
    """P6 and P7, of the preset `digits`."""
    found = other("step", "digits", *["--quick"] * quick)
    calls = found["calls"]
    wanted = {"student": 1, "student with gradient": 1, "real": 1, "fake": 2, "fake with gradient": 1}
    hidden = sum(abs(calls.get(name, 0) - number) for name, number in wanted.items())
    text = ", ".join(f"{name} {calls.get(name, 0)}" for name in wanted)
    return [
        Line("P6", "bare calls over a training step, digits", found["ratio"], "", 0.95, True),
        Line("P7", "network calls beside the method's own", hidden, "", 0, note=text),
    ]


def training_latents(quick: bool) -> list[Line]:
    """P6 of the default preset, and on a GPU at the size of Stable Diffusion 1.5."""
    shapes = other("step", "shapes", "--runs", "8" if quick else "20")
    lines = [Line("P6", "bare calls over a training step, shapes", shapes["ratio"], "", 0.95, True)]
    if torch.cuda.is_available():
        large = other("step", *LARGE, "--runs", "5")
        lines += [
            Line("P6", "bare calls over a training step, SD 1.5", large["ratio"], "", 0.95, True),
            Line("P6", "model FLOPs utilisation, SD 1.5", large["mfu"], "", 0.35, True, "of a large matrix product's"),
        ]
    return lines


# ----------------------------------------------------------------------------- P8


def frechet() -> list[Line]:
    """P8, on one thread; clean-fid's own function where it is installed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    a, b = (
        moments(torch.randn(SAMPLES, DIMENSIONS, generator=draw) * scale + shift)
        for scale, shift in ((1.0, 0.0), (0.8, 0.05))
    )
    started = time.process_time()
    found = frechet_distance(a, b)
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    itself = frechet_distance(a, a)
    theirs, note = _clean_fid(a.mean.numpy(), a.cov.numpy(), b.mean.numpy(), b.cov.numpy())
    difference = None if theirs is None else abs(found - theirs) / theirs
    return [
        Line("P8", f"Fréchet distance, {DIMENSIONS} dimensions", seconds, "s", 3),
        Line("P8", "its difference from clean-fid's, relative", difference, "", 1e-6, note=note),
        Line("P8", "of a set to itself", itself, "", 1e-6),
    ]


def _clean_fid(*arguments: Any) -> tuple[float | None, str]:
    try:
        import scipy
        from cleanfid.fid import frechet_distance as theirs
    except ImportError:
        return None, "clean-fid is not installed"
    try:
        return float(theirs(*arguments)), f"SciPy {scipy.__version__}"
    except TypeError:  # of its call of sqrtm
        return None, f"clean-fid fails with SciPy {scipy.__version__}; ours does not use it"


# ----------------------------------------------------------------------------- all


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs: at most 10 minutes on two quiet cores")
    parser.add_argument("--small", action="store_true", help="small networks for P3 and P4: a smoke test")
    parser.add_argument("--dtype", choices=sampling.DTYPES, help="of P3 and P4; left out, the fastest here")
    parser.add_argument("--only", nargs="+", choices=[f"P{i}" for i in range(1, 9)], help="as in --only P1 P8")
    options = parser.parse_args()
    say_machine()
    dtype = sampling.DTYPES[options.dtype] if options.dtype else _fast_dtype()
    runs = 2 if options.quick else 5
    parts: list[tuple[set[str], Callable[[], list[Line]]]] = [
        ({"P1"}, lambda: sampler(10 if options.quick else 50)),
        ({"P2"}, precision),
        ({"P3", "P4"}, lambda: speed(runs, options.small, dtype)),
        ({"P5"}, lambda: writing(options.quick)),
        ({"P6", "P7"}, lambda: training(options.quick)),
        ({"P6"}, lambda: training_latents(options.quick)),
        ({"P8"}, frechet),
    ]
    lines: list[Line] = []
    started = time.perf_counter()
    for names, work in parts:
        if options.only is None or names & set(options.only):
            found = [line for line in work() if options.only is None or line.name in options.only]
            print("\n".join(map(str, found)), flush=True)
            lines += found
    missed = [line.name for line in lines if line.met is False]
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s; missed: {', '.join(dict.fromkeys(missed)) or 'none'}")
    finish("all", {"seconds": seconds, "lines": [asdict(line) | {"met": line.met} for line in lines]}, options.json)


def _has_amx() -> bool:
    """Whether this is a processor with units for matrices (x86's AMX), as Linux tells it."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _fast_dtype() -> torch.dtype:
    """float16 on a GPU; on a processor bfloat16 where it multiplies large matrices faster than float32."""
    if torch.cuda.is_available():
        return torch.float16
    dtypes = (torch.float32, torch.bfloat16)
    return max(dtypes, key=lambda dtype: common.matmul_rate(torch.device("cpu"), dtype))


if __name__ == "__main__":
    main()
