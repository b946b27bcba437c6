"""Our sampler beside stock diffusers': `python -m benchmarks.peers [--networks shipped|sd15|DIR] [--quick]`.

The same work, in one process and in turns: prompts to images on the CPU, with the very same network objects (so that
weights, precision and memory layout cannot differ) and the same batch. What differs is what surrounds the networks:

  one step     `StableDiffusionPipeline` with the LCMScheduler that our exports name, guidance off; ours: `one_step`
  many steps   the same pipeline with its DDIMScheduler and its EulerDiscreteScheduler, guided; ours: `ddim`

First both make images of the same noise, and the difference is printed: a faster sampler that samples something else
has won nothing. Then every ratio (stock / ours, above 1 is ours faster) is the median over rounds in which both ran,
beside half of their quartiles' range. With a GPU everything is measured eagerly and compiled (`--modes`).

`shipped` is the student that comes with the package; `sd15` has the size of Stable Diffusion 1.5 and random weights. No
other peer is measured; `OTHERS` says of each why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, sampling
from benchmarks.common import finish, in_turns, middle, ratio, say_machine
from benchmarks.sampling import DTYPES, GUIDANCE, MODES, Parts, marked
from dmd import seeding, shipped
from dmd.codec import Codec
from dmd.denoiser import Guided
from dmd.errors import InputError
from dmd.generate import Generator, student_generator, teacher_generator
from dmd.noise import DDPM
from dmd.seeding import Stream
from dmd.solvers import ddim
from dmd.teachers import export, layout

SOME_STEPS = 4
"""Of the many, where there is no GPU."""

OTHERS = {
    "streamdiffusion 0.1.1": "pip would replace diffusers by 0.24",
    "k-diffusion 0.1.1": "does not import beside current setuptools: its dependency clip-anytorch needs pkg_resources",
    "stable-fast": "has no wheel for current torch, and its development has paused",
    "NVlabs/FastGen": "is not on PyPI (fastgen there is another), and pins diffusers 0.35 and transformers 4.49",
    "nvidia-modelopt": "its DMD is of flow-matching networks (Qwen-Image), not of Stable Diffusion",
    "DMD2, devrimcavusoglu/dmd": "CC BY-NC-SA, and not on PyPI",
    "OpenDMD": "GPL-2.0, and not on PyPI",
    "SiD, SiD-LSG": "not on PyPI, and written for torch 1.12 to 2.0",
}
"""Peers that are not measured, and why (looked at in November 2026)."""


@dataclass(frozen=True)
class Pairing:
    """Two ways to do the same: images (B, 3, H, W) in [0, 1], on the CPU.

    Attributes:
        ours: from seeds.
        stock: from its own draws, or from given noise.
        noise: (B, c, h, w), what ours draws.
    """

    ours: Callable[[], Tensor]
    stock: Callable[[Tensor | None], Tensor]
    noise: Tensor

    def difference(self) -> float:
        """Root mean square, both from the same noise."""
        return (self.ours() - self.stock(self.noise)).double().square().mean().sqrt().item()


def scheduler_of(kind: Any, schedule: DDPM, **settings: Any) -> Any:
    """A scheduler of diffusers with our table, on the grid that our solvers take."""
    table = {"num_train_timesteps": schedule.steps, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return kind(**table, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1, **settings)


def lcm(schedule: DDPM, parts: Parts) -> Any:
    """The scheduler of our exports."""
    from diffusers import LCMScheduler

    settings = layout.Settings(schedule, parts.denoiser.prediction, tuple(parts.shape), "AutoencoderKL")  # type: ignore[arg-type]
    return LCMScheduler.from_config(export.scheduler_config(settings))


def pipeline(parts: Parts, codec: Any, scheduler: Any) -> Any:
    """The stock pipeline around our networks."""
    from diffusers import StableDiffusionPipeline

    found: Any = StableDiffusionPipeline(
        vae=codec.vae,
        text_encoder=parts.text.network,
        tokenizer=parts.text.tokenizer,
        unet=parts.denoiser.get_submodule("net.unet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    return found


def pairings(parts: Parts, batch: int, steps: int) -> dict[str, Pairing]:
    """All that is compared, by name."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    unet: Any = parts.denoiser.get_submodule("net.unet")
    schedule: Any = parts.denoiser.schedule
    prompts = [f"a photograph of a small red circle, number {i}" for i in range(batch)]
    z = seeding.normal(0, Stream.SAMPLE, 0, torch.arange(batch, device=unet.device), parts.shape)

    def ours(sampler: Generator, codec: Codec) -> Tensor:
        return (sampling.drawn(parts, prompts, sampler, codec, Tensor.float) / 2 + 0.5).clamp(0, 1)

    def stock(pipe: Any, count: int, scale: float, latents: Tensor | None) -> Tensor:
        draws = None if latents is not None else [torch.Generator().manual_seed(i) for i in range(batch)]
        start = None if latents is None else latents.to(unet.dtype)
        return pipe(
            prompts, height=parts.shape[1] * parts.enlargement, width=parts.shape[2] * parts.enlargement,
            num_inference_steps=count, guidance_scale=scale, generator=draws, latents=start, output_type="pt",
        ).images.float().cpu()  # fmt: skip

    one = student_generator(parts.denoiser)
    many = teacher_generator(Guided(parts.denoiser, GUIDANCE, parts.text.null), ddim, steps)
    plain = {"clip_sample": False, "set_alpha_to_one": True}
    euler = scheduler_of(EulerDiscreteScheduler, schedule, prediction_type=lcm(schedule, parts).config.prediction_type)
    as_ddim = scheduler_of(DDIMScheduler, schedule, prediction_type=euler.config.prediction_type, **plain)
    found = {}
    for name, codec in parts.codecs.items():
        pipe = pipeline(parts, codec, lcm(schedule, parts))
        found[f"one step, {name} decoder"] = Pairing(partial(ours, one, codec), partial(stock, pipe, 1, 0.0), z)
    full = next(iter(parts.codecs.values()))
    for title, scheduler in (("DDIM", as_ddim), ("Euler", euler)):
        pipe = pipeline(parts, full, scheduler)
        found[f"{steps} guided steps, {title}"] = Pairing(
            partial(ours, many, full), partial(stock, pipe, steps, GUIDANCE), z
        )
    return found


@torch.no_grad()
def measured(todo: dict[str, Pairing], runs: int) -> list[dict[str, Any]]:
    """A row for each pairing."""
    rows = []
    for name, pairing in todo.items():
        row: dict[str, Any] = {"work": name, "difference_rms": pairing.difference()}
        works: dict[str, Callable[[], object]] = {"ours": pairing.ours, "stock": partial(pairing.stock, None)}
        times = in_turns({who: partial(marked, work) for who, work in works.items()}, runs)
        for who, found in times.items():
            row[f"{who}_seconds"], row[f"{who}_spread"] = middle(found)
        row["ratio"], row["ratio_spread"] = ratio(times["stock"], times["ours"])
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], batch: int, mode: str) -> None:
    print(f"\n{f'batch {batch}, {mode}':26}{'ours, ms':>19}{'stock, ms':>19}{'stock / ours':>18}{'images differ':>15}")
    for row in rows:
        ours, stock = (f"{1e3 * row[f'{w}_seconds']:.1f} +- {1e3 * row[f'{w}_spread']:.1f}" for w in ("ours", "stock"))
        times = f"{row['ratio']:.3f} +- {row['ratio_spread']:.3f}"
        print(f"{row['work']:26}{ours:>19}{stock:>19}{times:>18}{row['difference_rms']:>15.1e}", flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--networks", default="shipped", help="shipped, sd15, or the folder of a student")
    parser.add_argument("--dtype", choices=DTYPES, help="float16 on a GPU and float32 on a CPU if left out")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--modes", choices=MODES, nargs="+", help="on a GPU eager and compile if left out, else eager")
    parser.add_argument("--steps", type=int, help=f"of the many; 50 on a GPU and {SOME_STEPS} on a CPU if left out")
    parser.add_argument("--runs", type=int, default=10, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="3 runs: a smoke test")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    steps = options.steps or (50 if gpu else SOME_STEPS)
    if options.runs < 2 or steps < 1 or min(options.batch_sizes) < 1:
        parser.error("--runs must be at least 2, --steps and --batch-sizes at least 1")
    say_machine()
    dtype_name = options.dtype or ("float16" if gpu else "float32")
    dtype = DTYPES[dtype_name]
    if options.networks == "sd15":
        parts = sampling.random_parts(sampling.SD_1_5, dtype, device)
    else:
        folder = shipped.resolve(Path("shapes-student" if options.networks == "shipped" else options.networks))
        try:
            parts = sampling.read_parts(Path(folder), dtype, device)
        except InputError as error:
            parser.error(str(error))
    print(f"{options.networks}: {parts.shape[-1] * parts.enlargement} pixels, {dtype_name}")
    results = []
    for mode in options.modes or (["eager", "compile"] if gpu else ["eager"]):
        sampling.set_mode(parts, mode)
        for batch in options.batch_sizes:
            rows = measured(pairings(parts, batch, steps), 3 if options.quick else options.runs)
            show(rows, batch, mode)
            results += [{"mode": mode, "batch": batch} | row for row in rows]
    print("\nnot measured:")
    for name, why in OTHERS.items():
        print(f"  {name}: {why}")
    finish(
        "peers",
        {"networks": options.networks, "dtype": dtype_name, "rows": results, "not_measured": OTHERS},
        options.json,
    )


if __name__ == "__main__":
    main()
