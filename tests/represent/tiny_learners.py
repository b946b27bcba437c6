"""Learners of a few thousand weights on random images, for tests; as a program, a gradient of each by its processes."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from dmd.batches import Share
from dmd.data.images import ImageSet
from dmd.represent import augment, backbones, heads, learners
from dmd.represent.backbones import describe
from dmd.represent.batches import CropBatches, ViewBatches
from dmd.represent.config import AugmentOptions
from dmd.represent.learners import Attraction, Classifying, Learner, Pace, Practice, Reading, Slow, Student, Synclr
from dmd.represent.sources import Labelled
from dmd.represent.text import TextConfig, TextNet
from dmd.run import average_gradients, clip_and_check

CPU = torch.device("cpu")
STRONG = AugmentOptions((0.3, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, True, 0.3, 2, 8, (0.1, 0.4))
KINDS = ("views", "views-and-text", "classes", "synclr", "synclr-batch")


class Words:
    """A tokenizer of class names "a" to "d": begin, letter, end."""

    def __call__(self, texts, **options):
        rows = [[4, "abcd".index(text), 5, 5] for text in texts]
        return type("Tokens", (), {"input_ids": torch.tensor(rows)})


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return heads.synchronised(make(), CPU)


def images(count=48, size=20):
    """Random images of four classes, each with a colour of its own."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(count) % 4
    colour = torch.randint(40, 216, (4, 3, 1, 1), generator=generator)[labels]
    noise = torch.randint(-40, 40, (count, 3, size, size), generator=generator)
    return ImageSet((colour + noise).to(torch.uint8), labels, tuple("abcd"))


def practice(steps=6, **more):
    return Practice(Pace(steps, 2, (0.1, 0.2)), clip_and_check, 10.0, **more)


def view_batches(share=None, text=False, m=3, crops=1, captions=8, instances=False):
    source = Labelled(images(), m, seed=1)
    transform = augment.standard(STRONG, 16)
    words = Words() if text else None
    return ViewBatches(1, source, captions, m, crops, transform, share or Share(), instances, words, 4)


def crop_batches(share=None):
    source = Labelled(images(), 2, seed=1)
    whole, local = augment.whole(STRONG, 16), augment.local(STRONG)
    return CropBatches(1, source, 8, 2, whole, local, 2, share or Share(), (4, 4), 0.5, 0.5)


def backbone(name="resnet_mini", **more):
    config = describe(name, 16, 3, 4 if name == "vit_mini" else None, **more)
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2} if name == "vit_mini" else {"channels": (4, 8, 8, 16)}
    config = backbones.BackboneConfig(config.architecture, 16, 3, {**config.arguments, **small})
    return seeded(lambda: backbones.build(config))


def learner(kind="views", net=None, pace=6, **more):
    net = backbone() if net is None else net
    terms = {}
    if kind != "classes":
        head = seeded(lambda: heads.mlp(net.features, 16, 8, 3, heads.batch_relu))
        terms["images"] = Attraction(head, 0.1)
    else:
        terms["classes"] = seeded(lambda: Classifying(net.features, 4, 0.1))
    if kind == "views-and-text":
        terms["text"] = Reading(seeded(lambda: TextNet(TextConfig(net.features, 8, 1, 2, 4, 6, 4, 5, 8))))
    made = learners.optimizer([net, *terms.values()], 1e-2, 0.98, 0.1)
    return Learner(net, terms, dict.fromkeys(terms, 1.0), made, practice(pace, **more))


def synclr(net=None, pace=6, ibot=1.0, batch_norm=False, **more):
    net = backbone("vit_mini") if net is None else net
    between, last = (heads.layer_gelu, heads.standardise)
    if batch_norm:
        between, last = (heads.batch_relu, heads.batch_standardise)

    def projection(inputs, layers):
        return heads.mlp(inputs, 16, 8, layers, between, last(8))

    student = Student(
        net, seeded(lambda: projection(net.features, 3)), seeded(lambda: heads.ibot_head(net.features, 16, 8, 12))
    )
    predictor = seeded(lambda: projection(8, 2), 1)
    made = learners.optimizer([student, predictor], 1e-2, 0.999, 0.1)
    return Synclr(student, predictor, made, Slow(0.9, 0.08, True, ibot, (0.04, 0.07, 4), 3), practice(pace, **more))


def double(batch):
    """A batch whose images are float64."""
    changed = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{k: v.double() for k, v in changed.items() if getattr(v, "is_floating_point", bool)()})


def gradient(kind, share, **more):
    """Figures and gradients of a first step in float64, averaged over processes."""
    crops = kind.startswith("synclr")
    task = synclr(batch_norm=kind == "synclr-batch", **more) if crops else learner(kind, **more)
    batches = crop_batches(share) if crops else view_batches(share, kind == "views-and-text")
    for net in task.modules().values():
        net.double()
    figures = task.gradient(0, double(batches(0).to(CPU)))
    nets = {k: v for k, v in task.modules().items() if k != "teacher"}
    named = {f"{n}.{k}": p for n, net in nets.items() for k, p in net.named_parameters()}
    average_gradients(list(named.values()))
    return figures, {k: p.grad.clone() for k, p in named.items() if p.grad is not None}


def main(folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    share = Share(accelerator.process_index, accelerator.num_processes)
    for kind in KINDS:
        figures, gradients = gradient(kind, share)
        means = {k: accelerator.gather(v[None]).mean(0) for k, v in figures.items()}
        if accelerator.is_main_process:
            torch.save({"figures": means, "gradients": gradients}, folder / f"{kind}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
