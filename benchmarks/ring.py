"""Quality against an exact score: `python -m benchmarks.ring [--schedule ddpm|karras|linear] [--quick]`.

A one-step student is distilled from a ring of 8 Gaussians whose real score is known in closed form, with the product's
own `Distiller`, pairs and draws. Printed: the modes' shares, the part of the samples within 4 standard deviations of a
mode, and the maximum mean discrepancy (MMD) beside that of fresh real samples (the floor), of 64 Heun steps with the
exact score (what the student is taught: DDPM's starts from pure noise, though its table ends with a little signal) and
of the untrained student.
"""

import copy
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import finish, say_machine
from dmd import pairs, seeding
from dmd.batches import DistillBatches, Share
from dmd.denoiser import Guided, NetworkDenoiser, Prediction, karras, velocity
from dmd.distill import Distiller
from dmd.ema import Ema
from dmd.losses import denoising_loss, squared_distance
from dmd.mixture import MixtureDenoiser
from dmd.noise import DDPM, Karras, Linear, Schedule, expand
from dmd.run import Cadence, clip_and_check
from dmd.seeding import Stream
from dmd.solvers import heun, one_step

MODES, RADIUS, STD = 8, 2**0.5, 0.1
SIGMA_DATA = 1.0  # radius^2 / 2: each coordinate has unit variance, as diffusion models expect
RATE = 4e-3  # learning rate of all networks
FAMILIES: dict[str, tuple[Schedule, Prediction]] = {
    "ddpm": (DDPM(), velocity),
    "karras": (Karras(), karras(SIGMA_DATA)),
    "linear": (Linear(), karras(SIGMA_DATA)),
}


class PointNet(nn.Module):
    """F(x_t, t) for points in the plane: a residual MLP over the scaled point and sines of the noise level."""

    def __init__(self, schedule: Schedule, width: int = 128, depth: int = 3):
        super().__init__()
        self.schedule = schedule
        self.clock = torch.exp2(torch.arange(-2.0, 4.0))
        self.waves = torch.tensor([1.0, 2.0, 4.0, 8.0])
        self.enter = nn.Linear(2 + 4 * len(self.waves) + 2 * len(self.clock), width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule(t)
        c_in = (alpha**2 * SIGMA_DATA**2 + sigma**2).rsqrt()
        x = expand(c_in, x_t) * x_t
        angle = torch.atan2(sigma, alpha)[:, None] * self.clock
        wave = (x[:, :, None] * self.waves).flatten(1)
        h = self.enter(torch.cat((x, wave.sin(), wave.cos(), angle.sin(), angle.cos()), dim=1))
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.leave(nn.functional.silu(h))


def ring(schedule: Schedule) -> MixtureDenoiser:
    """8 equal Gaussians of standard deviation 0.1 on a circle of radius 1.41: neighbours are 10.8 of them apart."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return MixtureDenoiser(schedule, RADIUS * torch.stack((angle.cos(), angle.sin()), dim=1), STD)


def draw(mixture: MixtureDenoiser, count: int, step: int) -> Tensor:
    """(count, 2) real samples."""
    index = torch.arange(count)
    uniform = seeding.uniform(0, Stream.DATA, step, index)
    return mixture.draw(uniform, seeding.normal(0, Stream.TEACH_NOISE, step, index, (2,)))


def learn(denoiser: NetworkDenoiser, real: MixtureDenoiser, steps: int, batch: int) -> None:
    """Teach a network the ring's denoiser: student and fake score start from it, as in DMD."""
    optimizer = torch.optim.Adam(denoiser.parameters(), RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        index = torch.arange(batch)
        t = seeding.uniform(0, Stream.TEACH_TIME, step, index)
        noise = seeding.normal(0, Stream.CRITIC_NOISE, step, index, (2,))
        x0 = draw(real, batch, step)
        x_t = denoiser.schedule.diffuse(x0, noise, t)
        loss = denoising_loss(denoiser(x_t, t, {}), x0, denoiser.coefficients(t, x_t)[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mmd(a: Tensor, b: Tensor) -> float:
    """Maximum mean discrepancy (V-statistic, its root) with a sum of Gaussian kernels of widths 0.05 to 0.8."""

    def kernel(x: Tensor, y: Tensor) -> float:
        squared = torch.cdist(x, y) ** 2
        return sum(torch.exp(-squared / (2 * w**2)).mean().item() for w in (0.05, 0.1, 0.2, 0.4, 0.8)) / 5

    return max(0.0, kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)) ** 0.5


def figures(x: Tensor, real: MixtureDenoiser) -> dict[str, float]:
    """Shares of the modes, relative to 1/8, and the part of the samples near one."""
    distance, mode = torch.cdist(x, real.means).min(1)
    share = torch.bincount(mode, minlength=MODES) * (MODES / len(x))
    return {
        "share_min": share.min().item(),
        "share_max": share.max().item(),
        "within_4_std": (distance < 4 * STD).float().mean().item(),
        "mmd": mmd(x, draw(real, len(x), 1_000_000)),
    }


def distil(name: str, steps: int, batch: int, count: int) -> dict[str, float]:
    """Distil one schedule's student and measure it on `count` samples."""
    schedule, prediction = FAMILIES[name]
    real = ring(schedule)
    torch.manual_seed(0)
    teacher = NetworkDenoiser(PointNet(schedule), schedule, prediction)
    started = time.perf_counter()
    learn(teacher, real, steps // 4, batch)
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    first, second = (torch.optim.Adam(n.parameters(), RATE, betas=(0.9, 0.99)) for n in (student, fake))
    average = Ema(student.net, 0.999)
    task = Distiller(
        student, Guided(real, 1.0, {}), fake, first, second, average, squared_distance, 1.0, 10.0, clip_and_check
    )
    spec = pairs.PairSpec("ring", "heun", 64, 1.0, 0, 1, "ring", (2,), 16384, 16384)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        list(pairs.make(Path(folder), spec, [0], lambda z, _: heun(real, schedule.start(z), spec.steps, {})))
        pairs.finish(Path(folder), spec)
        store = pairs.Pairs(Path(folder), spec)
    ode = figures(store[torch.arange(count)][0], real)
    batches = DistillBatches(0, (2,), 1, lambda number: {}, batch, store, batch // 2, Share())
    rate = Cadence(steps, warmup=100, cooldown=steps // 2).rate
    z = seeding.normal(0, Stream.SAMPLE, 0, torch.arange(count), (2,))
    with torch.no_grad():
        untrained = figures(one_step(teacher, z, {}), real)
    for step in range(steps):
        for optimizer in (first, second):
            optimizer.param_groups[0]["lr"] = RATE * rate(step)
        task.step(step, batches(step))
    with torch.no_grad():
        result = figures(one_step(NetworkDenoiser(average.shadow, schedule, prediction), z, {}), real)
    floor = mmd(draw(real, count, 1_000_001), draw(real, count, 1_000_000))
    return result | {
        "mmd_floor": floor,
        "mmd_ode": ode["mmd"],
        "mmd_untrained": untrained["mmd"],
        "within_4_std_untrained": untrained["within_4_std"],
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--schedule", choices=list(FAMILIES), help="one of them; all if left out")
    parser.add_argument("--steps", type=int, default=4500, help="generator updates")
    parser.add_argument("--batch", type=int, default=256, help="noises per update")
    parser.add_argument("--count", type=int, default=8192, help="samples that are measured")
    parser.add_argument("--quick", action="store_true", help="a fifth of the updates: a smoke test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    say_machine()
    print(
        f"{'schedule':9}{'mode shares / (1/8)':>22}{'within 4 std':>14}"
        f"{'MMD':>9}{'floor':>9}{'ODE':>9}{'untrained':>11}{'s':>7}"
    )
    results = {}
    for name in [options.schedule] if options.schedule else FAMILIES:
        r = distil(name, options.steps // 5 if options.quick else options.steps, options.batch, options.count)
        shares = f"{r['share_min']:.3f} to {r['share_max']:.3f}"
        print(
            f"{name:9}{shares:>22}{r['within_4_std']:14.4f}{r['mmd']:9.4f}{r['mmd_floor']:9.4f}{r['mmd_ode']:9.4f}"
            f"{r['mmd_untrained']:11.4f}{r['seconds']:7.0f}",
            flush=True,
        )
        results[name] = r
    finish("ring", results, options.json)


if __name__ == "__main__":
    main()
