"""The main job from end to end: teacher, pairs, distillation, comparison, report. Each link resumes by itself."""

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd import build, checkpoint, evaluation, log, ranking, teachers
from dmd.batches import DistillBatches
from dmd.build import Workplace
from dmd.codec import Codec
from dmd.config import Config
from dmd.denoiser import Denoiser, Guided, NetworkDenoiser
from dmd.distill import Distiller
from dmd.errors import InputError
from dmd.generate import student_generator
from dmd.pairs import Pairs
from dmd.pipeline import Pipeline
from dmd.run import Cadence, Progress, Run

COLUMNS = {
    "accuracy": "accuracy", "caption_agreement": "agreement", "precision": "precision", "recall": "recall",
    "diversity": "diversity", "images_per_second": "images/s",
}  # fmt: skip
"""Figures of the table at the end, where there are such, and their titles."""

CARD = (
    "preset", "metric", "samples", "generator_updates", "distil_seconds", "wall_seconds", "teacher", "student",
    "fd_ratio", "caption_agreement", "accuracy", "speedup",
)  # fmt: skip
"""What of the summary goes into a student's card.json."""

ROWS = ("x", "x0_real", "x0_fake", "student", "teacher")
"""Titles of what `evaluation.inspect` returns."""

SHOWN = 16
"""The picture of the comparison shows so many samples, where they are asked for by prompts."""

EXTREMES = 8
"""The report shows so many of the best samples, and of the worst."""

INPUTS = "inputs.json"
"""File of a run directory with the checksums of what the run was given."""

ELAPSED = "elapsed.json"
"""And with the seconds that all its starts have taken."""


class Chain:
    """Runs a config in a directory. All that the user gives is read and checked here, before anything is written.

    Args:
        config: what to do.
        place: processes and device.
        folder: run directory; `run` needs it to be there.

    Raises:
        InputError: data, a given teacher or other files are not what they should be.
    """

    def __init__(self, config: Config, place: Workplace, folder: Path):
        self.config = config
        self.place = place
        self.folder = folder
        self.started = time.monotonic()
        build.check_shares(config, place)
        self.data = build.image_set(config) if config.data.data else None
        self.reference = build.reference_set(config, self.data)
        self.prompts = build.prompts(config, self.data)
        self.judged = build.judged_prompts(config, self.prompts)
        self.metric = build.metric(config, place.device)
        self.inputs: dict[str, str | None] = {
            "data": self.data.digest() if self.data else None,
            "prompts": build.text_digest(self.prompts),
            "features": build.file_digest(config.evaluation.features),
            "lpips_weights": build.file_digest(config.distill.lpips_weights),
        }
        if self.data is not None and config.evaluation.features is not None:
            build.feature_net(config, self.data)
        self.source = build.teacher_source(config, self.data)
        if config.teacher.teacher is not None:
            teacher = self._load_teacher()
        else:
            assert self.data is not None  # by `check`
            teacher = build.untaught(config, self.data)
        build.check_method(config, teacher, place)
        start = build.load_student(config, teacher)
        self.inputs["student"] = None if start is None else start.digest()

    def require_same_inputs(self) -> None:
        """Raises InputError if the run directory was made with other files."""
        try:
            known = json.loads((self.folder / INPUTS).read_text())
        except (OSError, ValueError):
            return
        for name, digest in self.inputs.items():
            if known.get(name, digest) != digest:
                raise InputError(
                    f"{self.folder} holds a run with another content of --{name.replace('_', '-')}: give that one, "
                    f"another --output-dir, or start over with --fresh"
                )

    def run(self) -> None:
        place, config = self.place, self.config
        self.watch = log.Stopwatch(self.folder / ELAPSED, self.started)
        place.first(lambda: checkpoint.write_json(self.folder / "environment.json", build.environment(place)))
        teacher = self._teacher()
        if teacher is None:
            return self._say("stopped while teaching; the same command goes on")
        place.together(self.require_same_inputs)
        place.first(lambda: checkpoint.write_json(self.folder / INPUTS, self.inputs))
        store = self._pairs(teacher)
        judge = build.judge(config, teacher, self.data, self.reference, self.judged, place)
        codec = build.regression_codec(config, teacher, place.device)
        targets = build.make_images(config, codec, store, place)
        distiller = build.distiller(config, teacher, place, build.regression(config, self.metric, codec, place))
        batches = build.distill_batches(config, teacher, self.prompts, store, place, targets)
        watched = build.watched(config, teacher, self.prompts, store, place)
        progress = self._distil(distiller, teacher, batches, judge, watched)
        if progress.step < config.distill.max_train_steps:
            return self._say(f"stopped after step {progress.step}; the same command goes on")
        real = distiller.real.denoiser
        del distiller, batches
        gc.collect()  # training's gradients and states, which the loop holds in a cycle: sampling needs their memory
        if place.main:
            self._conclude(progress, teacher, real, judge)
        place.accelerator.wait_for_everyone()

    def _load_teacher(self) -> Pipeline:
        teacher = build.load_teacher(self.config, self.data, self.place, self.source)
        self.inputs["teacher"] = teacher.digest()
        return teacher

    def _teacher(self) -> Pipeline | None:
        """The teacher, taught first if there is none; None if teaching was stopped."""
        if self.config.teacher.teacher is None:
            folder = Path(self.source)
            done = (folder / "model.safetensors").exists()
            self.place.accelerator.wait_for_everyone()
            assert self.data is not None  # by `check`
            if not done and not build.teach(self.config, self.data, self.place, folder):
                return None
        return self.place.together(self._load_teacher)

    def _pairs(self, teacher: Pipeline) -> Pairs | None:
        if self.config.distill.objective == "matching":
            return None
        spec = build.pair_spec(self.config, teacher, self.prompts)
        folder = build.pair_folder(self.config, spec)
        return build.make_pairs(self.config, teacher, self.prompts, spec, self.place, folder)

    def _distil(
        self, distiller: Distiller, teacher: Pipeline, batches: DistillBatches, judge: evaluation.Judge,
        watched: Sequence[evaluation.Watched],
    ) -> Progress:  # fmt: skip
        config, d = self.config, self.config.distill
        trained = build.ema_denoiser(distiller)
        student = self.folder / "student"
        average = trained  # or a copy on the main process, where the networks are sharded

        def evaluate(step: int) -> dict[str, float]:
            nonlocal average
            average = build.whole(trained, teacher, self.place)
            fake = build.whole(distiller.fake, teacher, self.place)
            if not self.place.main:
                return {}
            health = self._look(distiller.real, fake, average, watched, teacher.codec, step)
            if judge.best is None:
                teacher.save(average, student, self._made(step))
            if not judge.measures:
                return health
            return judge.in_loop(student_generator(average), config.evaluation.eval_samples) | health

        run = Run(
            self.folder,
            distiller,
            batches,
            Cadence(
                d.max_train_steps,
                config.run.log_every,
                config.run.checkpointing_steps,
                config.evaluation.eval_every,
                config.run.checkpoints_total_limit,
                d.lr_warmup_steps,
                d.lr_cooldown_steps,
            ),
            self.place.accelerator,
            title="distil",
            evaluate=evaluate,
            best=judge.best,
            keep_best=lambda step: teacher.save(average, student, self._made(step)),
            sinks=lambda step: [*build.sinks(config, self.folder)(step), self.watch],
        )
        return run.train()

    def _look(
        self, real: Guided, fake: NetworkDenoiser, student: NetworkDenoiser, watched: Sequence[evaluation.Watched],
        codec: Codec, step: int,
    ) -> dict[str, float]:  # fmt: skip
        """samples/step-N.png of what the method sees, a row each, and how far its images are from the teacher's."""
        seen: list[list[Tensor]] = [[] for _ in ROWS]
        for unit in watched:
            for row, samples in zip(seen, evaluation.inspect(student, real, fake, unit, 0.5), strict=True):
                with torch.no_grad():
                    row.append(codec.decode(samples).cpu())
        shown = [torch.cat(row) for row in seen]
        path = self.folder / "samples" / f"step-{step:08d}.png"
        evaluation.save_grid(shown, path, max(1, 32 // shown[0].shape[-1]), ROWS)
        return evaluation.drift(shown[-2], shown[-1])

    def _conclude(self, progress: Progress, teacher: Pipeline, real: Denoiser, judge: evaluation.Judge) -> None:
        """Compare the best student with its teacher, write summary.json, the pictures and the report."""
        from dmd import report

        config = self.config
        student = teachers.load(self.folder / "student", self.place.device, self.place.autocast)
        steps = config.evaluation.compare_steps or config.pairs.teacher_steps
        compared = Guided(real, config.pairs.guidance, teacher.null())  # matching may have had another scale
        generator, evaluations = build.many_step(config, compared, steps)
        figures, x_student, x_teacher = evaluation.compare(
            judge, student_generator(student.denoiser), generator, config.evaluation.final_samples, evaluations
        )
        count = min(2 * len(judge.prompts), 32) if judge.best else SHOWN
        shown = [x[:count] for x in (x_student, x_teacher)]
        scale = max(1, 32 // x_student.shape[-1])
        evaluation.save_grid(shown, self.folder / "samples" / "final.png", scale, ("student", "teacher"))
        summary = self._summary(progress, figures, judge)
        checkpoint.write_json(self.folder / "summary.json", summary)
        order, numbers = build.order_of_images(config, judge, self.data), judge.numbers(len(x_student))
        asked = [judge.prompts[i] for i in numbers.tolist()]
        picks = ranking.extremes(order.rank(x_student, x_teacher, numbers), asked, 0, EXTREMES)
        ranking.save(self.folder / "samples", order, x_student, x_teacher, picks)
        teacher.save(student.denoiser, self.folder / "student", self._made(progress.step) | _card(summary))
        checkpoint.write_json(self.folder / "student" / "card.json", self._facts(summary))
        self.watch.keep()
        self._say(f"{self._verdict(figures, judge)}\nreport: {report.write(self.folder)}")

    def _summary(self, progress: Progress, figures: dict[str, Any], judge: evaluation.Judge) -> dict[str, Any]:
        d = self.config.distill
        updates = progress.step - d.critic_warmup_steps
        critic = 0 if d.objective == "regression" else progress.step * d.critic_steps_per_generator_step
        fresh = 0 if d.objective == "regression" else d.batch_size * d.critic_steps_per_generator_step
        paired = 0 if d.objective == "matching" else d.pair_batch_size
        teacher, student, count = figures["teacher"], figures["student"], self.config.evaluation.final_samples
        summary = {
            "preset": self.config.preset,
            "objective": d.objective,
            "metric": judge.name,
            "reference_images": judge.reference_images,
            "samples": count,
            "prompts": [] if judge.best else [judge.prompts[i] for i in judge.numbers(count)[:SHOWN].tolist()],
            "wall_seconds": self.watch.seconds,
            "distil_seconds": progress.seconds,
            "generator_updates": updates,
            "critic_updates": critic,
            "images_seen": progress.step * fresh + updates * paired,
            "best": progress.best,
            "teacher": teacher | {"folder": str(self.source)},
            "student": student | {"folder": str(self.folder / "student")},
            "speedup": student["images_per_second"] / teacher["images_per_second"],
        }
        if "fd" in teacher:
            summary["fd_ratio"] = student["fd"] / teacher["fd"]
        for name in ("accuracy", "caption_agreement"):
            if name in teacher:
                summary[name] = {"teacher": teacher[name], "student": student[name]}
        return summary

    def _facts(self, summary: dict[str, Any]) -> dict[str, Any]:
        """A student's card.json. Of folders it tells no more than their names: where they lie is nobody's business."""
        teacher = Path(self.source).resolve().name if Path(self.source).is_dir() else str(self.source)
        figures = {k: summary[k] for k in CARD if k in summary}
        for who in ("teacher", "student"):
            figures[who] = {k: v for k, v in figures[who].items() if k != "folder"}
        card = {"teacher": teacher, "guidance": self.config.pairs.guidance, "figures": figures}
        return card | {"environment": build.environment(self.place)}

    def _verdict(self, figures: dict[str, Any], judge: evaluation.Judge) -> str:
        """A table of the figures that there are."""
        student, teacher = figures["student"], figures["teacher"]
        columns = {name: title for name, title in COLUMNS.items() if name in teacher} | {"fd": judge.name}
        columns = {name: title for name, title in columns.items() if name in teacher}
        rows = ["".join([f"{'':8}", *(f" {title:>14}" for title in columns.values())])]
        for who, f in (("teacher", teacher), ("student", student)):
            rows.append("".join([f"{who:8}", *(f" {f[name]:14.4g}" for name in columns)]))
        speed = f"{student['images_per_second'] / teacher['images_per_second']:.1f} times the teacher's speed"
        if "fd" in teacher:
            speed += f", {student['fd'] / teacher['fd']:.2f} times its distance"
        return "\n".join([*rows, f"one step: {speed}"])

    def _made(self, step: int) -> dict[str, str]:
        """How a student was made, for its card."""
        facts = build.environment(self.place)
        command = " ".join([Path(facts["command"][0]).name, *facts["command"][1:]])
        return {
            "made by": f"`{command}`",
            "with": f"dmd {facts['dmd']} at commit {facts['commit']}, torch {facts['torch']}, {facts['device']}",
            "generator updates": f"{step:,}",
            "guidance of its teacher": f"{self.config.pairs.guidance:g}",
        }

    def _say(self, text: str) -> None:
        if self.place.main:
            print(text, flush=True)


def _card(summary: dict[str, Any]) -> dict[str, str]:
    """The final figures of a student beside its teacher's, for its card."""
    student, teacher = summary["student"], summary["teacher"]
    names = {"fd": summary["metric"]} | {n: t for n, t in COLUMNS.items() if n != "images_per_second"}
    figures = {t: f"{student[n]:.4g} (teacher {teacher[n]:.4g})" for n, t in names.items() if n in student}
    return figures | {
        "samples": f"{summary['samples']:,}, the teacher's by {teacher['nfe']} network evaluations",
        "speed": f"{summary['speedup']:.3g} times the teacher's",
        "time": f"{summary['wall_seconds'] / 60:.0f} minutes",
    }
