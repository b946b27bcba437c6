"""Our pixel UNet beside diffusers' `UNet2DModel`: `python -m benchmarks.unet [--quick]`.

Both as the `digits` teacher, with the same widths and attention, the same loss, batches and learning rate. Printed:
parameters, time of a forward and backward pass (in turns, in one run), and the denoising loss after some training.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import finish, middle, say_machine, seconds
from dmd import build
from dmd.batches import Share, TeachBatches
from dmd.config import preset
from dmd.denoiser import Cond, NetworkDenoiser, karras
from dmd.ema import Ema
from dmd.noise import Karras
from dmd.run import clip_and_check
from dmd.teach import Teacher, lognormal_times
from dmd.teachers import pixel
from dmd.teachers.unet import KarrasNet


class Diffusers(nn.Module):
    """`UNet2DModel` with our call: its timestep is EDM's clock times 1000, its class 10 means "none"."""

    def __init__(self, config: pixel.PixelConfig):
        super().__init__()
        import diffusers

        down = [f"{'Attn' if a else ''}DownBlock2D" for a in config.attention]
        up = [f"{'Attn' if a else ''}UpBlock2D" for a in reversed(config.attention)]
        self.net: Any = diffusers.UNet2DModel(
            sample_size=config.size,
            in_channels=config.channels,
            out_channels=config.channels,
            layers_per_block=config.blocks,
            block_out_channels=tuple(config.width * m for m in config.multipliers),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=config.width // 4,
            num_class_embeds=len(config.classes) + 1,
        )

    def forward(self, x: Tensor, clock: Tensor, label: Tensor) -> Tensor:
        return self.net(x, 1000 * clock, class_labels=label).sample


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="50 training steps, 5 runs")
    options = parser.parse_args()
    steps, runs = (50, 5) if options.quick else (options.steps, options.runs)
    say_machine()

    config = preset("digits")
    t, data = config.teacher, build.image_set(config)
    architecture = build.pixel_config(config, data)
    schedule = Karras()
    times = lognormal_times(schedule, t.p_mean, t.p_std)

    def draw_data(index: torch.Tensor) -> tuple[torch.Tensor, Cond]:
        return data.pixels(index), pixel.labels(data.labels[index])

    draw = TeachBatches(0, draw_data, len(data), times, architecture.null(), t.teach_batch_size, Share())
    tasks = {}
    for name in ("ours", "diffusers"):
        if name == "ours":
            denoiser = pixel.build(architecture)
        else:
            torch.manual_seed(0)
            net = KarrasNet(Diffusers(architecture), schedule, t.sigma_data)
            denoiser = NetworkDenoiser(net, schedule, karras(t.sigma_data))
        denoiser.net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(denoiser.parameters(), t.teach_lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
        tasks[name] = Teacher(denoiser, optimizer, Ema(denoiser.net, t.teach_ema), 1.0, clip_and_check)

    losses: dict[str, list[float]] = {name: [] for name in tasks}
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for step in range(steps):
        batch = draw(step)
        for name, task in tasks.items():
            for group in task.optimizer.param_groups:
                group["lr"] = t.teach_lr * min(1.0, (step + 1) / 100, 3 * (1 - step / steps))
            if step >= steps - runs:
                spent[name] += seconds(lambda task=task, step=step, batch=batch: task.step(step, batch), 1, 0)  # type: ignore[misc]
            else:
                task.step(step, batch)
    for step in range(10_000, 10_040):
        for name, task in tasks.items():
            (b,) = draw(step)
            x_t = schedule.diffuse(b.x0, b.noise, b.t)
            average = NetworkDenoiser(task.ema.shadow, schedule, task.denoiser.prediction)
            with torch.no_grad():
                _, out = average.coefficients(b.t, x_t)
                losses[name].append((((average(x_t, b.t, b.cond) - b.x0) / out) ** 2).mean().item())
    results = {}
    print(f"{'':10}{'parameters':>12}{'training step, ms':>20}{'loss after ' + str(steps) + ' steps':>24}")
    for name, task in tasks.items():
        median, spread = middle(spent[name])
        count = sum(p.numel() for p in task.denoiser.parameters())
        loss = sum(losses[name]) / len(losses[name])
        print(f"{name:10}{count:12,}{f'{median * 1e3:.1f} +- {spread * 1e3:.1f}':>20}{loss:24.4f}")
        results[name] = {"parameters": count, "step_ms": median * 1e3, "loss": loss}
    finish("unet", results, options.json)


if __name__ == "__main__":
    main()
