"""Time from prompt to image: `python -m benchmarks.sampling [--pipeline DIR] [--batch-sizes 1 4] [--quick]`.

One step of a student against the guided steps of its teacher, in one process and in turns, by the code that users run:
tokens, noise, text encoder, UNet, decoder, the image on the CPU. Beside it the same networks called bare, so that one
sees what the sampler adds (target: 2 % at 512 pixels), and each network alone, with its share of the arithmetic that a
large matrix product reaches. All with the autoencoder's decoder and with a tiny one (the sizes of TAESD).

On a GPU the networks run eagerly (`--modes eager`), compiled (`compile`), and compiled and recorded as CUDA graphs
(`graphs`: one launch a network, which is what decides at batch 1); the first calls of the last two take minutes.

Left alone it measures networks of the size of Stable Diffusion 1.5 with random weights; a folder of any such pipeline,
teacher or student, is measured instead with --pipeline (its tiny decoder stays random, so look at no images). Without
a GPU only two of the teacher's steps are run, unless with --full, and its times are then extrapolated and say so.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import finish, in_turns, matmul_rate, middle, peak_memory, say_machine
from dmd.codec import KL, Codec, Tiny
from dmd.data.images import to_uint8
from dmd.denoiser import Guided, NetworkDenoiser, epsilon
from dmd.errors import InputError
from dmd.generate import Generator, decoded, images, student_generator, teacher_generator
from dmd.noise import DDPM
from dmd.solvers import ddim
from dmd.teachers import miniature, stable_diffusion
from dmd.teachers.stable_diffusion import TextEncoder, TimestepNet

GUIDANCE = 7.5
SOME_STEPS = 2
"""Of the teacher, where all would take too long."""
MODES = {"eager": None, "compile": "default", "graphs": "reduce-overhead"}
"""Of running networks, and torch.compile's names for them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """What distinguishes the networks of a Stable Diffusion from diffusers' and transformers' defaults.

    Attributes:
        side: height and width of the latents.
        unet_widths: channels of each resolution; all but the last have attention.
        unet_heads, text_heads: of attention.
        vae_widths: channels of each resolution.
        groups: of all normalisations.
        text_width, text_layers, tokens, vocabulary: of the text encoder.
    """

    side: int = 64
    unet_widths: tuple[int, ...] = (320, 640, 1280, 1280)
    unet_heads: int = 8
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    groups: int = 32
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    tokens: int = 77
    vocabulary: int = 49408


SD_1_5 = Sizes()
SMALL = Sizes(16, (32, 64), 4, (16, 32), 8, 64, 2, 4, 77, 1000)


@dataclass(frozen=True, eq=False)
class Parts:
    """What is measured.

    Attributes:
        shape: (c, h, w) of the latents.
        enlargement: of images over latents.
        codecs: by what they are called, the autoencoder and a tiny one.
    """

    denoiser: NetworkDenoiser
    text: TextEncoder
    shape: tuple[int, ...]
    enlargement: int
    codecs: dict[str, KL | Tiny]


def networks(sizes: Sizes) -> tuple[Any, Any, Any]:
    """UNet, autoencoder and text encoder with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    levels = len(sizes.unet_widths) - 1
    unet = UNet2DConditionModel(
        sample_size=sizes.side,
        block_out_channels=sizes.unet_widths,
        down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.unet_heads,  # diffusers means their number
        norm_num_groups=sizes.groups,
    )
    vae = AutoencoderKL(
        sample_size=sizes.side * 2 ** (len(sizes.vae_widths) - 1),
        block_out_channels=sizes.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae_widths),
        layers_per_block=2,
        norm_num_groups=sizes.groups,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=sizes.tokens,
            bos_token_id=sizes.vocabulary - 2,
            eos_token_id=sizes.vocabulary - 1,
        )
    )
    return unet, vae, text


def random_parts(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Parts:
    with torch.device(device):
        unet, vae, text = (nn.Module.to(net, device=device, dtype=dtype).eval() for net in networks(sizes))
    with tempfile.TemporaryDirectory() as folder:
        miniature.write_tokenizer([], sizes.tokens, Path(folder))
        tokenizer = stable_diffusion.tokenizer(Path(folder))
    denoiser = NetworkDenoiser(TimestepNet(unet, DDPM()), DDPM(), epsilon)
    return with_tiny(denoiser, TextEncoder(tokenizer, text), (4, sizes.side, sizes.side), KL(vae, 0.18215))


def read_parts(folder: Path, dtype: torch.dtype, device: torch.device) -> Parts:
    found = stable_diffusion.load(folder, dtype, device)
    full: Any = found.codec
    return with_tiny(found.denoiser, found.text, found.shape, full)


@torch.no_grad()
def with_tiny(denoiser: NetworkDenoiser, text: TextEncoder, shape: tuple[int, ...], full: KL | Tiny) -> Parts:
    """All parts, in the memory layout that is fastest; the tiny decoder enlarges as much as the autoencoder does."""
    from diffusers import AutoencoderTiny

    parameter = next(denoiser.parameters())
    latents = torch.zeros(1, *shape, device=parameter.device)
    enlargement = full.decode(latents).shape[-1] // shape[-1]
    doublings = enlargement.bit_length() - 1
    tiny: Any = AutoencoderTiny(
        latent_channels=shape[0],
        encoder_block_out_channels=(64,) * (doublings + 1),
        decoder_block_out_channels=(64,) * (doublings + 1),
        num_encoder_blocks=(1,) + (3,) * doublings,
        num_decoder_blocks=(3,) * doublings + (1,),
    )
    nn.Module.to(tiny, device=parameter.device, dtype=parameter.dtype).eval()
    for net in (denoiser, full.vae, tiny):
        nn.Module.to(net, memory_format=torch.channels_last)
    return Parts(denoiser.eval(), text, shape, enlargement, {"full": full, "tiny": Tiny(tiny)})


def drawn(
    parts: Parts, prompts: Sequence[str], sampler: Generator, codec: Codec, finish: Callable[[Tensor], Tensor]
) -> Tensor:
    """An image of each prompt, of seeds 0, 1, ..., in one batch and on the CPU, by the code that users run."""
    seeds = torch.arange(len(prompts))
    return images(
        decoded(sampler, codec),
        seeds,
        lambda numbers: parts.text.encode([prompts[i] for i in numbers.tolist()]),
        seeds,
        parts.shape,
        next(parts.denoiser.parameters()).device,
        len(prompts),
        finish=finish,
    )


def works(parts: Parts, batch: int, steps: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name: networks alone, bare calls one after the other, and what users run."""
    unet: Any = parts.denoiser.get_submodule("net.unet")
    text: Any = parts.text.network
    prompts = [f"a photograph of a small red circle, number {i}" for i in range(batch)]
    tokens = parts.text.tokenizer(
        prompts, padding="max_length", max_length=parts.text.length, truncation=True, return_tensors="pt"
    )
    ids = tokens.input_ids.to(unet.device)
    x = torch.randn(batch, *parts.shape, device=unet.device, dtype=unet.dtype)
    index = torch.full((batch,), 999, device=unet.device)
    cond = parts.text.encode(prompts)
    words = cond["text"].to(unet.dtype)
    teacher = Guided(parts.denoiser, GUIDANCE, parts.text.null)

    def bare(vae: Any) -> None:
        vae.decode(unet(x, index, text(ids)[0], return_dict=False)[0])

    def from_prompts(sampler: Generator, codec: Codec) -> Tensor:
        return drawn(parts, prompts, sampler, codec, to_uint8)

    one, many = student_generator(parts.denoiser), teacher_generator(teacher, ddim, steps)
    found: dict[str, Callable[[], object]] = {
        "text encoder": partial(text, ids),
        "UNet": partial(unet, x, index, words, return_dict=False),
        "guided steps": partial(ddim, teacher, x.float(), steps, cond),
    }
    for name, codec in parts.codecs.items():
        vae: Any = codec.vae
        found |= {
            f"{name} decoder": partial(vae.decode, x),
            f"bare calls, {name}": partial(bare, vae),
            f"one step, {name}": partial(from_prompts, one, codec),
            f"teacher, {name}": partial(from_prompts, many, codec),
        }
    return found


@dataclass(frozen=True)
class Measured:
    """Seconds of each run, floating-point operations of one, and MiB in use at most."""

    seconds: list[float]
    flops: float
    peak_mib: float

    def plus(self, other: "Measured", factor: float) -> "Measured":
        """This work and `factor` times the other."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return replace(self, seconds=[a + factor * b for a, b in pairs], flops=self.flops + factor * other.flops)


def set_mode(parts: Parts, mode: str) -> None:
    """Make all networks run in one of `MODES` from now on."""
    torch.compiler.reset()
    decoders = [codec.vae.decoder for codec in parts.codecs.values()]
    for net in (parts.text.network, parts.denoiser.get_submodule("net.unet"), *decoders):
        net._compiled_call_impl = None
        if MODES[mode]:
            net.compile(mode=MODES[mode], dynamic=False)


@torch.no_grad()
def measure(todo: dict[str, Callable[[], object]], runs: int, warm_up: int = 1) -> dict[str, Measured]:
    """Every work `runs` times, in turns, after one call that counts and `warm_up` that compile, where that is asked."""
    counted, memory = {}, {}
    for name, work in todo.items():
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            work()
        counted[name] = counter.get_total_flops()
    times = in_turns({name: partial(marked, work) for name, work in todo.items()}, runs, warm_up)
    for name, work in todo.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            marked(work)
        memory[name] = peak_memory()
    return {name: Measured(times[name], counted[name], memory[name]) for name in todo}


def marked(work: Callable[[], object]) -> None:
    """Tells recorded CUDA graphs that the results of the work before are not needed any more."""
    torch.compiler.cudagraph_mark_step_begin()
    work()


def extrapolated(found: dict[str, Measured], factor: float) -> dict[str, Measured]:
    """As if the teacher had taken `factor` times its steps: more of its guided steps, and nothing else."""
    guided = found["guided steps"]
    teachers = {n: m.plus(guided, factor - 1.0) for n, m in found.items() if n == "guided steps" or "teacher" in n}
    return found | teachers


def figures(found: dict[str, Measured], names: list[str]) -> dict[str, float]:
    """Ratios, each the median of those of the runs."""

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(found[a].seconds, found[b].seconds, strict=True))

    speedups = {f"speedup, {n}": ratio(f"teacher, {n}", f"one step, {n}") for n in names}
    overheads = {f"overhead, {n}": ratio(f"one step, {n}", f"bare calls, {n}") - 1.0 for n in names}
    return {"speedup, UNet": ratio("guided steps", "UNet")} | speedups | overheads


def show(found: dict[str, Measured], ratios: dict[str, float], batch: int, mode: str, peak: float, note: str) -> None:
    """The table of a batch size; `peak` operations per second are what the device can do."""
    memory = "peak MiB" if torch.cuda.is_available() else "peak MiB so far"
    print(f"\n{f'batch {batch}, {mode}':22}{'ms per image':>20}{'of matmul':>11}{memory:>17}", flush=True)
    for name, m in found.items():
        median, spread = (1e3 * t / batch for t in middle(m.seconds))
        share = m.flops / statistics.median(m.seconds) / peak
        estimate = note if name == "guided steps" or "teacher" in name else ""
        print(f"{name:22}{f'{median:.1f} +- {spread:.1f}':>20}{share:11.3f}{m.peak_mib:17.0f}  {estimate}")
    for name, value in ratios.items():
        text = f"{value:20.1f} x  {note}" if name.startswith("speedup") else f"{100 * value:+20.2f} %"
        print(f"{name:22}{text}")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pipeline", type=Path, help="a folder in diffusers' layout instead of random weights")
    parser.add_argument("--dtype", choices=DTYPES, help="float16 on a GPU and float32 on a CPU if left out")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=["eager"], help="how the networks run")
    parser.add_argument("--steps", type=int, default=50, help="of the teacher")
    parser.add_argument("--full", action="store_true", help="run all the teacher's steps also without a GPU")
    parser.add_argument("--runs", type=int, default=10, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="small networks and 3 runs: a smoke test")
    options = parser.parse_args()
    if options.runs < 2 or options.steps < 1 or min(options.batch_sizes) < 1:
        parser.error("--runs must be at least 2, --steps and --batch-sizes at least 1")
    say_machine()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    dtype_name = options.dtype or ("float16" if gpu else "float32")
    dtype = DTYPES[dtype_name]
    if options.pipeline:
        what = str(options.pipeline)
        try:
            parts = read_parts(options.pipeline, dtype, device)
        except InputError as error:
            parser.error(str(error))
    else:
        what = "small networks, random weights" if options.quick else "Stable Diffusion 1.5, random weights"
        parts = random_parts(SMALL if options.quick else SD_1_5, dtype, device)
    pixels = parts.shape[-1] * parts.enlargement
    peak = matmul_rate(device, dtype)
    print(f"{what}: {pixels} pixels, {dtype_name}, {options.steps} guided steps")
    print(f"large matrix product: {peak / 1e12:.3g} TFLOP/s")

    run_steps = options.steps if gpu or options.full else min(SOME_STEPS, options.steps)
    note = "" if run_steps == options.steps else f"EXTRAPOLATED from {run_steps} steps to {options.steps}"
    results: list[dict[str, Any]] = []
    torch.backends.cudnn.benchmark = True
    for mode in options.modes:
        set_mode(parts, mode)
        for batch in options.batch_sizes:
            runs = 3 if options.quick else options.runs
            found = measure(works(parts, batch, run_steps), runs)
            found = extrapolated(found, options.steps / run_steps)
            ratios = figures(found, list(parts.codecs))
            show(found, ratios, batch, mode, peak, note)
            rows = {}
            for name, m in found.items():
                median, spread = (1e3 * t / batch for t in middle(m.seconds))
                rows[name] = {"ms_per_image": median, "spread_ms": spread, "flops": m.flops, "peak_mib": m.peak_mib}
            results.append({"batch": batch, "mode": mode} | rows | ratios)
    finish("sampling", {
        "networks": what, "pixels": pixels, "dtype": dtype_name, "matmul_flops_per_second": peak,
        "steps": options.steps, "teacher_steps_run": run_steps, "extrapolated": bool(note), "batches": results,
    }, options.json)  # fmt: skip


if __name__ == "__main__":
    main()
