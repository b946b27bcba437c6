"""One DMD iteration against its bare parts: `python -m benchmarks.step [PRESET] [--quick]`.

The parts are the network calls that the method cannot do without: the student's forward and backward on noises and
pairs, the real and the fake score's forward, the fake score's forward and backward; for text to image the text
encoder's forward besides. The iteration also diffuses, computes the losses, clips and checks gradients, updates two
networks and an average, and has its batch drawn, as in training one step ahead in a thread (`--serial`: before it).
Printed: how much of it is bare work (target: 95 % or more), model FLOPs utilisation (the parts' floating-point
operations over what a large matrix product reaches on the same device), and how often each network was called (target:
no hidden pass).
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import finish, middle, say_machine, seconds
from dmd import build, pairs
from dmd.batches import Ahead
from dmd.config import PRESETS, Config, preset, with_run
from dmd.distill import Batch, Distiller
from dmd.losses import squared_distance
from dmd.pipeline import Pipeline
from dmd.solvers import one_step
from dmd.teachers import pixel
from dmd.teachers.stable_diffusion import StableDiffusion

CLASSES = tuple(str(i) for i in range(10))


def distiller(config: Config, place: build.Workplace) -> tuple[Distiller, Pipeline]:
    """A preset's distiller around its given teacher, or a pixel network of random weights."""
    t, d = config.teacher, config.data
    if t.teacher is not None:
        given = build.load_teacher(config, None, place, t.teacher)
        given.denoiser.net.to(memory_format=torch.channels_last)
        return build.distiller(config, given, place, squared_distance), given
    architecture = pixel.PixelConfig(
        CLASSES, d.channels, d.size, t.width, t.multipliers, t.blocks, t.attention, t.sigma_data
    )
    teacher = pixel.build(architecture, autocast=place.autocast).to(place.device).requires_grad_(False)
    with torch.no_grad():  # fresh networks end in zeros
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    teacher.net.to(memory_format=torch.channels_last)
    pipeline = pixel.Pixel(teacher, architecture)
    return build.distiller(config, pipeline, place, squared_distance), pipeline


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


def bare(task: Distiller, batch: Batch, encode: Callable[[], object]) -> Callable[[], None]:
    """The network calls of one iteration, one after the other."""
    z, cond = torch.cat((batch.z, batch.z_ref)), batch.cond
    cond_x = {k: v[: len(batch.t)] for k, v in cond.items()}
    x_t = task.student.schedule.diffuse(batch.z, batch.noise, batch.t)

    def calls() -> None:
        encode()
        task.student.zero_grad()
        one_step(task.student, z, cond).square().mean().backward()
        with torch.no_grad():
            task.real(x_t, batch.t, cond_x)
            task.fake(x_t, batch.t, cond_x)
        task.fake.zero_grad()
        task.fake(x_t, batch.t, cond_x).square().mean().backward()

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


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    median, _ = middle(seconds(lambda: a @ b, 7))
    return 2 * n**3 / median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="digits", choices=list(PRESETS))
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--serial", action="store_true", help="draw each batch before its step, not in a thread")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="5 runs")
    options = parser.parse_args()
    runs = 5 if options.quick else options.runs
    say_machine()

    config = with_run(preset(options.preset), mixed_precision=options.mixed_precision)
    place = build.workplace(config)
    task, pipeline = distiller(config, place)
    asked = CLASSES if config.data.prompts is None else build.prompts(config, None)
    spec = pairs.PairSpec("random", "heun", 1, 1.0, 0, len(asked), "any", pipeline.shape, 512, 512)
    with tempfile.TemporaryDirectory() as folder:
        list(pairs.make(Path(folder), spec, [0], lambda z, _: z))
        pairs.finish(Path(folder), spec)
        batches = build.distill_batches(config, pipeline, asked, pairs.Pairs(Path(folder), spec), place)
        rows = config.distill.batch_size + config.distill.pair_batch_size
        parts = bare(task, batches(0).batches[0], text_calls(pipeline, asked[:rows]))
        with FlopCounterMode(display=False) as counter:
            parts()
        flops = counter.get_total_flops()

        drawn = batches if options.serial else Ahead(batches)

        def iteration(step: int) -> None:
            task.step(step, drawn(step))

        calls = counted(task, partial(iteration, 0))
        whole, alone = [], []
        for i in range(runs):  # in turns, so that a busy moment of the machine meets both
            whole += seconds(partial(iteration, i), 1, 2 if i == 0 else 0)
            alone += seconds(parts, 1, 2 if i == 0 else 0)
    step, step_spread = middle(whole)
    parts_time, parts_spread = middle(alone)
    peak = matmul_rate(place.device, place.autocast or torch.float32)

    print(f"{options.preset}: {config.distill.batch_size} noises + {config.distill.pair_batch_size} pairs a step")
    print(f"  iteration        {step * 1e3:9.1f} +- {step_spread * 1e3:.1f} ms")
    print(f"  its bare calls   {parts_time * 1e3:9.1f} +- {parts_spread * 1e3:.1f} ms")
    print(f"  bare / iteration {parts_time / step:9.3f}   (target 0.95)")
    print(f"  utilisation      {flops / step / peak:9.3f}   ({flops / 1e9:.2f} GFLOP at {peak / 1e9:.0f} GFLOP/s)")
    print(f"  calls            {calls}")
    finish("step", {"preset": options.preset, "step_ms": step * 1e3, "bare_ms": parts_time * 1e3,
                    "serial": options.serial, "ratio": parts_time / step, "mfu": flops / step / peak,
                    "calls": calls})  # fmt: skip


if __name__ == "__main__":
    main()
