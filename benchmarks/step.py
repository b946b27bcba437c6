"""One DMD iteration against its bare parts: `python -m benchmarks.step [PRESET] [--flags of train_dmd.py] [--quick]`.

The parts are the network calls that the method cannot do without: the student's forward and backward on noises and
pairs, through the regression's distance; the real and the fake score's forward; the fake score's forward and backward;
for text to image the text encoder's forward besides. The iteration also draws its batch, diffuses, computes the losses,
clips and checks gradients, updates two networks and an average. Printed: how much of it is bare work (target: 95 % or
more), model FLOPs utilisation (the parts' floating-point operations, without what checkpointing computes again, over
what a large matrix product reaches on the same device), how often each network was called (target: no hidden pass),
and the memory held at most.

--random measures at the size of Stable Diffusion 1.5 with random weights, LPIPS's VGG included, in the place of what
`sd15` reads. --batch-size and --pair-batch-size are what the process does in one iteration, so give what a GPU holds.
"""

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, sampling
from benchmarks.common import finish, in_turns, matmul_rate, middle, peak_memory, ratio, say_machine
from dmd import build, pairs
from dmd.cli import flags
from dmd.codec import KL, Codec, Tiny
from dmd.config import Config
from dmd.denoiser import NetworkDenoiser
from dmd.distill import Batch, Distance, Distiller
from dmd.errors import InputError
from dmd.noise import DDPM
from dmd.pipeline import Pipeline
from dmd.solvers import one_step
from dmd.teachers import layout, pixel, switches
from dmd.teachers.stable_diffusion import StableDiffusion

CLASSES = tuple(str(i) for i in range(10))


def given(config: Config, place: build.Workplace) -> Pipeline:
    """A preset's given teacher, or a pixel network of random weights."""
    t, d = config.teacher, config.data
    if t.teacher is not None:
        return build.load_teacher(config, None, place, t.teacher)
    architecture = pixel.PixelConfig(
        CLASSES, d.channels, d.size, t.width, t.multipliers, t.blocks, t.attention, t.sigma_data
    )
    teacher = pixel.build(architecture, autocast=place.autocast).to(place.device).requires_grad_(False)
    with torch.no_grad():  # fresh networks end in zeros
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return pixel.Pixel(teacher, architecture)


def random_pipeline(place: build.Workplace) -> Pipeline:
    """Stable Diffusion 1.5 with random weights, and frozen."""
    parts = sampling.random_parts(sampling.SD_1_5, torch.float32, place.device)
    net, codec = parts.denoiser.net.requires_grad_(False), parts.codecs["full"]
    codec.vae.requires_grad_(False)
    parts.text.network.requires_grad_(False)
    denoiser = NetworkDenoiser(net, DDPM(), parts.denoiser.prediction, place.autocast)
    side = sampling.SD_1_5.side
    settings = layout.Settings(DDPM(), parts.denoiser.prediction, (4, side, side), "AutoencoderKL")
    return StableDiffusion(denoiser, parts.text, codec, settings, Path("random"), "random")


def distance(config: Config, pipeline: Pipeline, place: build.Workplace, random: bool) -> tuple[Distance, Codec]:
    """The config's regression distance, with a random trunk of LPIPS if there is no other, and its decoder."""
    codec = build.regression_codec(config, pipeline, place.device)
    if not random or config.distill.lpips_weights is not None or config.distill.regression != "lpips-vgg":
        return build.regression(config, build.metric(config, place.device), codec, place), codec
    from torchvision.models import vgg16

    with tempfile.TemporaryDirectory() as folder:
        trunk = Path(folder) / "vgg.safetensors"
        save_file({k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features")}, trunk)
        config = replace(config, distill=replace(config.distill, lpips_weights=str(trunk)))
        return build.regression(config, build.metric(config, place.device), codec, place), codec


def operations(parts: Callable[[], object], nets: Sequence[nn.Module]) -> float:
    """Floating-point operations of the bare calls. Those that `nets` would compute again for the backward pass do not
    count: utilisation is of useful ones."""
    eager = torch.compiler.set_stance("force_eager")
    with eager, switches.kept(*nets), FlopCounterMode(display=False) as counter:
        parts()
    return counter.get_total_flops()


def text_calls(pipeline: Pipeline, asked: Sequence[str]) -> Callable[[], object]:
    """The text encoder's forward on prompts whose tokens are there already; nothing for classes."""
    if not isinstance(pipeline, StableDiffusion):
        return lambda: None
    text = pipeline.text
    found = text.tokenizer(
        list(asked), padding="max_length", max_length=text.length, truncation=True, return_tensors="pt"
    )
    ids = found.input_ids.to(text.network.device)
    return torch.no_grad()(lambda: text.network(ids))


def bare(task: Distiller, batches: Sequence[Batch], encode: Callable[[], object]) -> Callable[[], None]:
    """The network calls of one iteration, one after the other."""
    work = []
    for b in batches:
        start = torch.cat((b.z, b.z_ref))
        x_t = task.student.schedule.diffuse(start[: len(b.t)], b.noise, b.t)
        work.append((b, start, x_t, {k: v[: len(b.t)] for k, v in b.cond.items()}))
    matched = [(x_t, b.t, cond) for b, _, x_t, cond in work if len(b.t)]

    def calls() -> None:
        encode()
        task.student.zero_grad()
        for b, start, _, _ in work:
            x = one_step(task.student, start, b.cond)
            loss = x[: len(b.t)].square().sum()
            if len(b.z_ref):
                loss = loss + task.distance(x[len(b.z) :], b.y_ref).mean()
            loss.backward()
        with torch.no_grad():
            for call in matched:
                task.real(*call)
                task.fake(*call)
        task.fake.zero_grad()
        for call in matched:
            task.fake(*call).square().mean().backward()

    return calls


def counted(task: Distiller, step: Callable[[], object]) -> dict[str, int]:
    """Forward calls of each network, and how many of them were recorded for a backward pass, in one call of `step`."""
    calls: Counter[str] = Counter()
    nets = {"student": task.student.net, "fake": task.fake.net, "real": task.real.get_submodule("denoiser.net")}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1
            calls[f"{name} with gradient"] += torch.is_grad_enabled()

        return hook

    handles = [net.register_forward_pre_hook(count(name)) for name, net in nets.items()]
    step()
    for handle in handles:
        handle.remove()
    return dict(calls)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="15 runs")
    parser.add_argument("--random", action="store_true", help="the size of Stable Diffusion 1.5, random weights")
    options, rest = parser.parse_known_args()
    runs = 15 if options.quick else options.runs
    try:
        config = flags.parse(rest, "python -m benchmarks.step", "", default="digits").config
    except InputError as error:
        parser.error(str(error))
    say_machine()

    place = build.workplace(config)
    pipeline = random_pipeline(place) if options.random else given(config, place)
    pipeline.denoiser.net.to(memory_format=torch.channels_last)
    measured, codec = distance(config, pipeline, place, options.random)
    task = build.distiller(config, pipeline, place, measured)
    nets = [task.student.net, task.fake.net, pipeline.denoiser.net]  # the last is the one that adapters share
    nets += [codec.vae] if isinstance(codec, KL | Tiny) else []
    asked = CLASSES
    if options.random:
        asked = tuple(f"a photograph, number {i}" for i in range(1000))
    elif config.data.prompts is not None:
        asked = tuple(build.prompts(config, None))
    spec = pairs.PairSpec("random", "heun", 1, 1.0, 0, len(asked), "any", pipeline.shape, 512, 512)
    with tempfile.TemporaryDirectory() as folder:
        list(pairs.make(Path(folder), spec, [0], lambda z, _: z))
        pairs.finish(Path(folder), spec)
        batches = build.distill_batches(config, pipeline, asked, pairs.Pairs(Path(folder), spec), place)
        rows = config.distill.batch_size + config.distill.pair_batch_size
        parts = bare(task, batches(0).batches, text_calls(pipeline, asked[:rows]))

        def iteration(step: int) -> None:
            task.step(step, batches(step))

        calls = counted(task, partial(iteration, 0))  # compiles, too, where that is asked for
        flops = operations(parts, nets)
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = itertools.count()
        times = in_turns({"whole": lambda: iteration(next(steps)), "parts": parts}, runs, warm_up=2)
    memory = peak_memory()
    step, step_spread = middle(times["whole"])
    parts_time, parts_spread = middle(times["parts"])
    part, part_spread = ratio(times["parts"], times["whole"])
    peak = matmul_rate(place.device, place.autocast or torch.float32)

    print(f"{config.preset}: {config.distill.batch_size} noises + {config.distill.pair_batch_size} pairs a step")
    print(f"  iteration        {step * 1e3:9.1f} +- {step_spread * 1e3:.1f} ms")
    print(f"  its bare calls   {parts_time * 1e3:9.1f} +- {parts_spread * 1e3:.1f} ms")
    print(f"  bare / iteration {part:9.3f} +- {part_spread:.3f}   (target 0.95)")
    print(f"  utilisation      {flops / step / peak:9.3f}   ({flops / 1e9:.2f} GFLOP at {peak / 1e9:.0f} GFLOP/s)")
    print(f"  memory           {memory:9.0f} MiB at most")
    print(f"  calls            {calls}")
    finish("step", {
        "preset": config.preset, "flags": rest,
        "step_ms": step * 1e3, "bare_ms": parts_time * 1e3,
        "ratio": part, "mfu": flops / step / peak, "peak_mib": memory, "calls": calls,
    }, options.json)  # fmt: skip


if __name__ == "__main__":
    main()
