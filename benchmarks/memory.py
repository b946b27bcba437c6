"""Memory of one iteration at Stable Diffusion v1.5's size, counted without a GPU.

`python -m benchmarks.memory [--quick]` counts what lies in memory all the time from the networks' parameters, and what
each phase of a run needs besides by following every allocation on tensors that have shapes but no data (torch's
FakeTensorMode and MemTracker):

* training: forward and backward of one noise, and apart from it of one pair whose regression goes through the decoder
  and LPIPS's VGG-16; or of several of both together, with the guided real score in between. Decoder and VGG are counted
  as if they were trained, since the tracker asks for that, which is a little too much.
* pairs: the teacher's guided network on a work unit of samples, in its float32 weights.
* judging while training, and comparing student and teacher afterwards, when training's states are gone: the same
  network, and the decoder in float32.

Fragmentation, cuDNN's workspaces and the CUDA context (1 to 2 GiB together) come on top. The last line is JSON.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks import common
from benchmarks.common import finish, say_machine
from benchmarks.sampling import SD_1_5, SMALL, Sizes, networks
from dmd.codec import KL, SLICE
from dmd.generate import work_unit
from dmd.teachers.lora import ATTENTION

GIB = 2**30
FLOAT, HALF = 4, 2
ADAM, ADAM_8BIT = 8.0, 2.0 + 2 * 4 / 256  # bytes a parameter; a float32 for each block of 256 of both 8-bit states


@dataclass(frozen=True)
class Case:
    """A way to fit an iteration.

    Attributes:
        lora_rank: of the fake score's adapters; 0 is a second network.
        checkpointing: of UNets and decoder.
        adam: bytes of its states a parameter.
        student_rank: of the student's adapters; 0 is a whole network.
        together: TOGETHER noises and pairs at a time, rather than one noise or one pair; with checkpointing.
    """

    lora_rank: int
    checkpointing: bool
    adam: float
    student_rank: int = 0
    together: bool = False


TOGETHER = (8, 4)
"""Noises and pairs of a micro-batch of `sd15` in one of 8 processes, which matches both."""
LPIPS_SIZE = 224

CASES = {
    "two networks": Case(0, False, ADAM),
    "two networks, checkpointing": Case(0, True, ADAM),
    "two networks, checkpointing, 8-bit Adam": Case(0, True, ADAM_8BIT),
    "LoRA fake score, checkpointing": Case(64, True, ADAM),
    "LoRA fake score, checkpointing, 8-bit Adam (sd15-24gb)": Case(64, True, ADAM_8BIT),
    "LoRA student and fake score, checkpointing": Case(64, True, ADAM, 64),
    "two networks, checkpointing, 8 noises + 4 pairs (sd15, a process of 8)": Case(0, True, ADAM, 0, True),
}


@dataclass(frozen=True)
class Counts:
    """Parameters of the parts, and the bytes that passes need besides weights and gradients.

    Attributes:
        adapters: parameters of adapters of rank 1.
        matching, regression: of a pass of the student alone, and through decoder and VGG; by whether activations are
            recomputed.
        together: of a pass of `TOGETHER`, recomputed.
        sampling: of a guided network on a work unit of samples.
        decoding: of the decoder on those.
    """

    unet: int
    vae: int
    text: int
    vgg: int
    adapters: int
    matching: dict[bool, int]
    regression: dict[bool, int]
    together: int
    sampling: int
    decoding: int


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def transient(networks: list[nn.Module], work: Callable[[], Tensor]) -> int:
    """Most bytes of one forward and backward pass that are neither weights nor the gradients that stay."""
    for net in networks:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
    return _most(networks, lambda: work().backward())


def _most(networks: list[nn.Module], work: Callable[[], object]) -> int:
    """Most bytes that some work holds besides weights and gradients."""
    tracker = MemTracker()
    tracker.track_external(*networks)
    with tracker:
        work()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    kept = [t for net in networks for p in net.parameters() for t in (p, p.grad) if t is not None]
    return int(peak["Total"]) - sum(t.numel() * t.element_size() for t in kept)


def count(sizes: Sizes) -> Counts:
    """Count at some size."""
    from torchvision.models import vgg16

    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, vae, text = networks(sizes)
        vgg = vgg16(weights=None).features
        real = networks(sizes)[0]  # the tracker takes each network once
        codec, (noises, paired) = KL(vae, 1.0), TOGETHER

        def latents(rows: int) -> Tensor:
            return torch.zeros(rows, 4, sizes.side, sizes.side)

        def call(rows: int, net: nn.Module = unet) -> Tensor:
            """Of weights that are trained autocast keeps a bf16 copy while a pass takes."""
            inputs = latents(rows), torch.full((rows,), 999), torch.zeros(rows, sizes.tokens, sizes.text_width)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=torch.is_grad_enabled()):
                return net(*inputs, return_dict=False)[0]

        def perceptual(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                image = nn.functional.interpolate(vae.decode(x).sample, size=LPIPS_SIZE, mode="bilinear")
                return vgg(image).float().square().mean()

        def matching() -> Tensor:
            return call(1).float().square().mean()

        def regression() -> Tensor:
            return perceptual(call(1))

        def together() -> Tensor:
            x = call(noises + paired)
            with torch.no_grad():
                call(2 * len(x), real)
            return perceptual(x[noises:]) + x.float().square().mean()

        with torch.no_grad():
            rows = work_unit(latents(1).shape[1:], codec)
            sampling = _most([unet], lambda: call(2 * rows))
            pixels = (sizes.side * codec.factor) ** 2
            decoding = _most([vae], lambda: codec.decode(latents(min(rows, SLICE // pixels))))
            decoding += 2 * rows * 3 * pixels * FLOAT  # images of the slices, and all of them
        found: dict[str, dict[bool, int]] = {"matching": {}, "regression": {}}
        for recompute in (False, True):
            if recompute:
                unet.enable_gradient_checkpointing()
                vae.enable_gradient_checkpointing()
            found["matching"][recompute] = transient([unet], matching)
            found["regression"][recompute] = transient([unet, vae, vgg], regression)
        a, b, c, d = (parameters(net) for net in (unet, vae, text, vgg))
        return Counts(
            a, b, c, d, adapters_of_rank_1(unet), found["matching"], found["regression"],
            transient([unet, vae, vgg, real], together), sampling, decoding,
        )  # fmt: skip


def adapters_of_rank_1(net: nn.Module) -> int:
    """Parameters of low-rank adapters, for each of their rank."""
    linear = [m for name, m in net.named_modules() if isinstance(m, nn.Linear) and name.endswith(ATTENTION)]
    return sum(m.in_features + m.out_features for m in linear)


def frozen(counts: Counts) -> float:
    """Bytes of decoder, text encoder and LPIPS."""
    return (counts.vae + counts.text + counts.vgg) * FLOAT


def at_rest(counts: Counts, case: Case) -> float:
    """Bytes that lie in memory while training: student with gradients, states and average; fake score; frozen parts."""
    student, fake = (rank * counts.adapters or counts.unet for rank in (case.student_rank, case.lora_rank))
    trained = (student + fake) * (2 * FLOAT + case.adam)
    average, real = student * FLOAT, counts.unet * HALF
    return trained + average + real + frozen(counts)


def phases(counts: Counts, case: Case) -> dict[str, float]:
    """Bytes at the largest moment of each phase of a run."""
    rest = at_rest(counts, case)
    step = max(counts.matching[case.checkpointing], counts.regression[case.checkpointing])
    show = max(counts.sampling, counts.decoding)
    adapters = (case.student_rank + case.lora_rank) * counts.adapters * 2 * FLOAT
    both = counts.unet * (HALF + FLOAT) + adapters + frozen(counts) + (counts.vae + counts.text) * FLOAT
    return {
        "pairs": counts.unet * FLOAT + frozen(counts) + counts.sampling,
        "training": rest + (counts.together if case.together else step),
        "judging": rest + show,
        "comparison": both + show,
    }


def peak(counts: Counts, case: Case) -> float:
    """Bytes at the largest moment of a run."""
    return max(phases(counts, case).values())


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks")
    options = parser.parse_args()
    say_machine()
    counts = count(SMALL if options.quick else SD_1_5)
    print(f"parameters: UNet {counts.unet:,}, adapters of rank 64 {64 * counts.adapters:,}")
    for what, found in (("student", counts.matching), ("student, decoder, VGG", counts.regression)):
        print(f"one pass of {what}: {found[False] / GIB:.2f} GiB, recomputed {found[True] / GIB:.2f} GiB")
    for what, bytes_of in (("guided network", counts.sampling), ("decoder", counts.decoding)):
        print(f"a work unit of samples, {what}: {bytes_of / GIB:.2f} GiB")
    print(f"{'GiB':72} {'at rest':>10}" + "".join(f" {name:>10}" for name in phases(counts, CASES["two networks"])))
    results = {name: {"rest": at_rest(counts, case), **phases(counts, case)} for name, case in CASES.items()}
    for name, row in results.items():
        print(f"{name:72}" + "".join(f" {value / GIB:10.2f}" for value in row.values()))
    finish("memory", {"counts": asdict(counts), "cases": results}, options.json)


if __name__ == "__main__":
    main()
