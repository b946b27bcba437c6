"""CLIP-GEN's costs: `python -m benchmarks.clipgen [PRESET] [--quick]`.

1. Sampling with the cache of keys and values against a full pass for every token, at 256 tokens: how many times faster
   (target: 5), and the largest difference of logits (target: 1e-5).
2. One training step of tokenizer and transformer against its bare calls: network, loss, backward pass and optimiser on
   a batch that is there already. The step also draws the batch, clips and checks gradients, and updates an average.
   Target: bare calls 90 % or more.
3. Floating-point operations of each stage by the preset's sizes, per image and in all.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import finish, middle, say_machine, seconds
from dmd import build, seeding
from dmd.batches import Share
from dmd.clipgen import clip as clips
from dmd.clipgen import sampling, transformer
from dmd.clipgen.batches import ImageBatches, TokenBatches
from dmd.clipgen.chain import tokenizer_config
from dmd.clipgen.clip import SmallClipConfig, SmallClipNet
from dmd.clipgen.config import PRESETS, Config, preset
from dmd.clipgen.gap import Gap
from dmd.clipgen.networks import ConvSizes
from dmd.clipgen.sampling import Sampler
from dmd.clipgen.tokenizer import Tokenizer, Tokenizing
from dmd.clipgen.transformer import ConditionalTransformer, Modelling, TransformerConfig
from dmd.ema import Ema
from dmd.run import clip_and_check
from dmd.seeding import Stream

CACHED = TransformerConfig(codes=1024, code_width=8, length=256, condition=128, layers=4, width=128, heads=4)
"""The transformer of the first measurement, small as on a laptop; larger ones gain more."""


def codebook(config: TransformerConfig) -> Tensor:
    """Codes of length one, of any kind."""
    return F.normalize(torch.randn(config.codes, config.code_width), dim=-1)


@torch.no_grad()
def uncached(net: ConditionalTransformer, condition: Tensor, seeds: Tensor) -> Tensor:
    """As `sampling.tokens` without guidance, by a full pass over all tokens so far for each token."""
    uniform = seeding.as_uniform(seeding.bits(0, Stream.TOKEN, 0, seeds.cpu(), net.config.length)).to(condition.device)
    inputs, vectors, outputs = net.prefix(condition), net.inputs(net.codebook), net.outputs(net.codebook)
    found: list[Tensor] = []
    while True:
        logits = F.linear(net.gpt(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1], outputs)
        found.append(sampling.choose(sampling.probabilities(logits, Sampler()), uniform[:, len(found)]))
        if len(found) == net.config.length:
            return torch.stack(found, dim=1)
        inputs = torch.cat((inputs, vectors[found[-1]][:, None]), dim=1)


def cache(device: torch.device, batch: int, runs: int) -> dict[str, float]:
    """The first measurement."""
    net = ConditionalTransformer(CACHED, codebook(CACHED)).to(device).eval()
    condition = F.normalize(torch.randn(batch, CACHED.condition, device=device), dim=-1)
    seeds = torch.arange(batch)
    ours, theirs = [], []
    for _ in range(runs):  # in turns, so that a busy moment of the machine meets both
        ours += seconds(lambda: sampling.tokens(net, condition, seeds, Sampler()), 1, warm_up=0)
        theirs += seconds(lambda: uncached(net, condition, seeds), 1, warm_up=0)
    tokens = sampling.tokens(net, condition, seeds, Sampler())
    with torch.no_grad():
        full = net(condition, tokens)
        logits, past = net.start(net.prefix(condition))
        apart = (logits - full[:, 0]).abs().max().item()
        for t in range(CACHED.length - 1):
            logits, past = net.following(tokens[:, t], past)
            apart = max(apart, (logits - full[:, t + 1]).abs().max().item())
    a, b = statistics.median(ours), statistics.median(theirs)
    return {"batch": batch, "cached_seconds": a, "uncached_seconds": b, "times_faster": b / a, "logits_apart": apart}


def share(step: Callable[[int], object], bare: Callable[[], object], runs: int) -> dict[str, float]:
    """Median seconds of a step and of its bare calls, and what part the second is of the first."""
    step(0)
    bare()
    whole, alone = [], []
    for i in range(runs):
        whole += seconds(lambda i=i: step(i), 1, warm_up=0)  # type: ignore[misc]
        alone += seconds(bare, 1, warm_up=0)
    (a, _), (b, _) = middle(whole), middle(alone)
    return {"step_seconds": a, "bare_seconds": b, "bare_share": b / a}


def tokenizer_step(config: Config, device: torch.device, runs: int) -> dict[str, float]:
    """A tokenizer's step, with the squared error as perceptual term and without discriminator."""
    o, size = config.tokenizer, config.data.size
    net = Tokenizer(tokenizer_config(config)).to(device)
    distance = lambda a, b: (a - b).square().flatten(1).mean(1)  # noqa: E731
    optimizer = build.adam(net, o.tokenizer_lr, (0.9, 0.95), 0.0)
    task = Tokenizing(net, optimizer, distance, 1.0, None, 1.0, clip_and_check, 0)
    images = torch.randint(0, 256, (256, 3, size, size), dtype=torch.uint8)
    batches = ImageBatches(0, images, o.tokenizer_batch_size, Share(device=device))
    (x,) = batches(0)

    def bare() -> None:
        net.zero_grad()
        rebuilt, _, commitment = net(x)
        ((rebuilt - x).abs().mean() + distance(rebuilt, x).mean() + commitment).backward()
        optimizer.step()

    return share(lambda step: task.step(step, batches(step)), bare, runs)


def transformer_step(config: Config, device: torch.device, runs: int) -> dict[str, float]:
    """A transformer's step."""
    o, sizes = config.transformer, transformer_config(config)
    net = ConditionalTransformer(sizes, codebook(sizes)).to(device)
    optimizers = transformer.optimizers(net, o.learning_rate, o.weight_decay, o.muon)
    task = Modelling(net, optimizers, Ema(net, o.ema), 0.0, lambda m: m, 1.0, clip_and_check, 0)
    tokens = torch.randint(0, sizes.codes, (1024, sizes.length))
    embeddings = F.normalize(torch.randn(1024, sizes.condition), dim=-1)
    gap = Gap(embeddings.mean(0), None, o.gap_noise)
    batches = TokenBatches(0, tokens, embeddings, gap, o.batch_size, Share(device=device), o.condition_dropout)
    (b,) = batches(0)

    def bare() -> None:
        net.zero_grad()
        F.cross_entropy(net(b.condition, b.tokens, b.dropped).flatten(0, 1), b.tokens.flatten()).backward()
        for optimizer in optimizers.values():
            optimizer.step()

    return share(lambda step: task.step(step, batches(step)), bare, runs)


def transformer_config(config: Config) -> TransformerConfig:
    o, found = config.transformer, tokenizer_config(config)
    width = config.clip.clip_width if config.clip.clip is None else 512
    lengths = (found.codes, found.code_width, found.length)
    return TransformerConfig(*lengths, width, o.layers, o.width, o.heads, o.dropout, o.prefix)


def counted(net: nn.Module, call: Callable[[Any], Tensor]) -> float:
    """Floating-point operations of a forward and a backward pass of one image."""
    with FlopCounterMode(display=False) as counter:
        call(net).sum().backward()
    return float(counter.get_total_flops())


def small_clip(config: Config) -> SmallClipNet:
    """The small CLIP of a preset; one that learns words from nothing has 600 of them."""
    o, size = config.clip, config.data.size
    sizes = ConvSizes(o.clip_patch, o.clip_widths, o.clip_blocks)
    if o.clip_text is None:
        text = (o.clip_text_width, o.clip_text_layers, o.clip_tokens, 600)
        return SmallClipNet(SmallClipConfig(size, sizes, *text, o.clip_width))
    return clips.beginning_with(clips.text_start(o.clip_text), size, sizes, o.clip_width, o.clip_lock_text)


def operations(config: Config) -> dict[str, dict[str, float]]:
    """Of one image and of all images of each stage's training."""
    found, o, size = tokenizer_config(config), config.clip, config.data.size
    image = torch.zeros(1, 3, size, size)
    sizes = transformer_config(config)
    rows = {
        "tokenizer": (
            counted(Tokenizer(found).eval(), lambda net: net.decoder(net.encoder(image))),
            config.tokenizer.tokenizer_steps * config.tokenizer.tokenizer_batch_size,
        ),
        "transformer": (
            counted(
                ConditionalTransformer(sizes),
                lambda net: net(torch.zeros(1, sizes.condition), torch.zeros(1, sizes.length, dtype=torch.int64)),
            ),
            config.transformer.max_train_steps * config.transformer.batch_size,
        ),
    }
    if o.clip is None:
        small = small_clip(config)
        text = torch.full((1, small.config.tokens), small.config.vocabulary - 1)
        flops = counted(small, lambda net: net.of_images(image).sum() + net.of_tokens(text).sum())
        rows["clip"] = (flops, o.clip_steps * o.clip_batch_size)
    return {name: {"gflop_per_image": f / 1e9, "images": n, "tflop": f * n / 1e12} for name, (f, n) in rows.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("preset", nargs="?", default="shapes", choices=list(PRESETS))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="of the first measurement")
    parser.add_argument("--quick", action="store_true", help="2 runs")
    options = parser.parse_args()
    runs = 2 if options.quick else options.runs
    say_machine()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = preset(options.preset)
    results: dict[str, Any] = {"operations": operations(config)}
    for stage, row in results["operations"].items():
        each, total = f"{row['gflop_per_image']:.3f} GFLOP an image", f"{row['tflop']:.3g} TFLOP"
        print(f"{stage:12} {each}, {row['images']:,} images, {total}")
    results["cache"] = cache(device, options.batch, max(1, runs // 3))
    c = results["cache"]
    print(
        f"256 tokens, batch {options.batch}: {c['cached_seconds']:.2f} s with the cache, {c['uncached_seconds']:.2f} s "
        f"without, {c['times_faster']:.1f} times faster; logits {c['logits_apart']:.1e} apart"
    )
    for name, measure in (("tokenizer", tokenizer_step), ("transformer", transformer_step)):
        results[name] = row = measure(config, device, max(runs, 2))
        print(
            f"{name:12} step {1e3 * row['step_seconds']:.0f} ms, bare calls {1e3 * row['bare_seconds']:.0f} ms: "
            f"{row['bare_share']:.3f}"
        )
    finish("clipgen", results, options.json)


if __name__ == "__main__":
    main()
