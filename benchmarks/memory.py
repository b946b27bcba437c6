"""Memory of one iteration at Stable Diffusion v1.5's size, counted without a GPU.

`python -m benchmarks.memory [--quick]` counts what lies in memory all the time from the networks' parameters, and what
an iteration needs besides by following every allocation of a forward and backward pass on tensors that have shapes but
no data (torch's FakeTensorMode and MemTracker): one noise, and apart from it one pair whose regression goes through the
decoder and LPIPS's VGG-16. Those two are counted as if they were trained, since the tracker asks for that, which is a
little too much. The largest of these is added to the former. Fragmentation, cuDNN's workspaces and the CUDA context (1
to 2 GiB together) come on top. The last line is JSON.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks import common
from benchmarks.common import finish, say_machine
from benchmarks.sampling import SD_1_5, SMALL, Sizes, networks
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
    """

    lora_rank: int
    checkpointing: bool
    adam: float
    student_rank: int = 0


CASES = {
    "two networks": Case(0, False, ADAM),
    "two networks, checkpointing": Case(0, True, ADAM),
    "two networks, checkpointing, 8-bit Adam": Case(0, True, ADAM_8BIT),
    "LoRA fake score, checkpointing": Case(64, True, ADAM),
    "LoRA fake score, checkpointing, 8-bit Adam (sd15-24gb)": Case(64, True, ADAM_8BIT),
    "LoRA student and fake score, checkpointing": Case(64, True, ADAM, 64),
}


@dataclass(frozen=True)
class Counts:
    """Parameters of the parts, and the bytes that passes need besides weights and gradients.

    Attributes:
        adapters: parameters of adapters of rank 1.
        matching, regression: of a pass of the student alone, and through decoder and VGG; by whether activations are
            recomputed.
    """

    unet: int
    vae: int
    text: int
    vgg: int
    adapters: int
    matching: dict[bool, int]
    regression: dict[bool, int]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def transient(networks: list[nn.Module], work: Callable[[], Tensor]) -> int:
    """Most bytes of one forward and backward pass that are neither weights nor the gradients that stay."""
    work().backward()  # gradients are there from now on
    tracker = MemTracker()
    tracker.track_external(*networks)
    with tracker:
        work().backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    kept = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    kept += sum(
        p.grad.numel() * p.grad.element_size() for net in networks for p in net.parameters() if p.grad is not None
    )
    return int(peak["Total"]) - kept


def count(sizes: Sizes) -> Counts:
    """Count at some size."""
    from torchvision.models import vgg16

    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, vae, text = networks(sizes)
        vgg = vgg16(weights=None).features
        z, text_of = torch.zeros(1, 4, sizes.side, sizes.side), torch.zeros(1, sizes.tokens, sizes.text_width)

        def student() -> Tensor:
            return unet(z, torch.tensor([999]), text_of, return_dict=False)[0]

        def matching() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return student().float().square().mean()

        def regression() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return vgg(vae.decode(student()).sample).float().square().mean()

        found: dict[str, dict[bool, int]] = {"matching": {}, "regression": {}}
        for recompute in (False, True):
            if recompute:
                unet.enable_gradient_checkpointing()
                vae.enable_gradient_checkpointing()
            found["matching"][recompute] = transient([unet], matching)
            found["regression"][recompute] = transient([unet, vae, vgg], regression)
        a, b, c, d = (parameters(net) for net in (unet, vae, text, vgg))
        return Counts(a, b, c, d, adapters_of_rank_1(unet), found["matching"], found["regression"])


def adapters_of_rank_1(net: nn.Module) -> int:
    """Parameters of low-rank adapters, for each of their rank."""
    linear = [m for name, m in net.named_modules() if isinstance(m, nn.Linear) and name.endswith(ATTENTION)]
    return sum(m.in_features + m.out_features for m in linear)


def at_rest(counts: Counts, case: Case) -> float:
    """Bytes that lie in memory all the time: student with gradients, states and average; fake score; frozen parts."""
    student, fake = (rank * counts.adapters or counts.unet for rank in (case.student_rank, case.lora_rank))
    trained = (student + fake) * (2 * FLOAT + case.adam)
    average, real = student * FLOAT, counts.unet * HALF
    return trained + average + real + (counts.vae + counts.text) * FLOAT + counts.vgg * FLOAT


def peak(counts: Counts, case: Case) -> float:
    """Bytes at the largest moment of an iteration of one noise and one pair."""
    passes = max(counts.matching[case.checkpointing], counts.regression[case.checkpointing])
    return at_rest(counts, case) + passes


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks")
    options = parser.parse_args()
    say_machine()
    counts = count(SMALL if options.quick else SD_1_5)
    print(f"parameters: UNet {counts.unet:,}, adapters of rank 64 {64 * counts.adapters:,}")
    for what, found in (("student", counts.matching), ("student, decoder, VGG", counts.regression)):
        print(f"one pass of {what}: {found[False] / GIB:.2f} GiB, recomputed {found[True] / GIB:.2f} GiB")
    print(f"{'GiB, one noise or one pair at a time':56} {'at rest':>8} {'peak':>8}")
    for name, case in CASES.items():
        print(f"{name:56} {at_rest(counts, case) / GIB:8.2f} {peak(counts, case) / GIB:8.2f}")
    results = {name: {"rest": at_rest(counts, case), "peak": peak(counts, case)} for name, case in CASES.items()}
    finish("memory", {"counts": vars(counts), "cases": results}, options.json)


if __name__ == "__main__":
    main()
