"""One step, many steps, and token by token: `python -m benchmarks.text_to_image --student DIR --clipgen RUN`.

A table of a one-step student, its teacher and a CLIP-GEN model on the same captions of the world of shapes: the part of
images that show their caption, Fréchet distance and CLIP score by CLIP-GEN's own CLIP, and images per second. CLIP-GEN
has learnt without captions and has not seen some combinations; those captions are measured apart.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import finish, say_machine
from dmd import teachers
from dmd.cli.sample import teacher_of
from dmd.clipgen import chain, evaluation, model
from dmd.clipgen.config import read
from dmd.clipgen.evaluation import Asked
from dmd.data.images import to_float
from dmd.denoiser import Guided
from dmd.evaluation import Judge
from dmd.generate import Generator, student_generator, teacher_generator
from dmd.pipeline import Pipeline
from dmd.solvers import ddim


def measured(x: Tensor, asked: Asked, whole: model.Model, seen: evaluation.Features) -> dict[str, float]:
    """Agreement, distance and score of images (N, 3, 64, 64) made for the captions asked for."""
    real, texts = to_float(asked.images), model.embed_texts(whole.clip, asked.captions)
    pictures = model.embed_images(whole.clip, real, whole.device)
    found = evaluation.agreement(x, asked) | evaluation.scores(x, texts, pictures, whole)
    return found | evaluation.distances(x, evaluation.blurred_moments(real, seen, (0,)), seen)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--student", default="runs/shapes/student", help="folder of a student in a finished run")
    parser.add_argument("--clipgen", default="runs/clipgen-shapes", help="a finished run of dmd clipgen")
    parser.add_argument("--samples", type=int, default=512, help="images of each kind of captions")
    parser.add_argument("--steps", type=int, default=50, help="of the teacher")
    parser.add_argument("--quick", action="store_true", help="16 images and 2 steps: a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.steps = 16, 2
    say_machine()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Path(options.clipgen)
    config = read(run / "config.json")
    config = replace(config, evaluation=replace(config.evaluation, final_samples=options.samples))
    whole = chain.with_texts(config, model.load(run / chain.MODEL, device))
    tests, (label, seen) = chain.tests(config), chain.features(config, whole)
    judged = evaluation.judge(
        whole, tests, chain.make_sampler(config.sampling), config.sampling.candidates,
        config.sampling.sample_batch_size, (0,), seen,
    )  # fmt: skip
    rows = {
        f"{a.name}/CLIP-GEN, {whole.net.config.length} tokens": judged.figures[f"{a.name}/text"]
        | {"images_per_second": judged.images_per_second}
        for a in tests
    }
    student = teachers.load(options.student, device)
    source, scale = teacher_of(Path(options.student))
    teacher = teachers.load(source, device)
    guided = Guided(teacher.denoiser, scale, teacher.null())
    others: list[tuple[str, Pipeline, Generator]] = [
        ("student, 1 step", student, student_generator(student.denoiser)),
        (f"teacher, {options.steps} steps", teacher, teacher_generator(guided, ddim, options.steps)),
    ]
    for asked in tests:
        for name, pipeline, generator in others:
            judge = Judge(pipeline, list(asked.captions), [], "", 0, device)
            x, rate = judge.samples(generator, len(asked.captions), 0, name)
            rows[f"{asked.name}/{name}"] = measured(x, asked, whole, seen) | {"images_per_second": rate}
    print(f"\n| Captions | Model | Agreement | {label} | CLIP score | Images/s |")
    print("|---|---|---:|---:|---:|---:|")
    for key, row in sorted(rows.items()):
        asked_name, name = key.split("/", 1)
        print(
            f"| {asked_name} | {name} | {row.get('caption_agreement', float('nan')):.1%} | {row['fd_0']:.4f} | "
            f"{row['clip_score']:.1f} | {row['images_per_second']:.3g} |"
        )
    facts = {"metric": label, "samples": options.samples, "steps": options.steps}
    finish("text_to_image", facts | {"rows": rows}, options.json)


if __name__ == "__main__":
    main()
