"""The main job from end to end: teacher, pairs, distillation, comparison, report. Each link resumes by itself."""

import json
import time
from pathlib import Path
from typing import Any

from dmd import build, checkpoint, evaluation
from dmd.build import Workplace
from dmd.config import Config
from dmd.denoiser import Guided, NetworkDenoiser
from dmd.distill import Distiller
from dmd.errors import InputError
from dmd.generate import student_generator
from dmd.pairs import Pairs
from dmd.run import Cadence, Progress, Run
from dmd.teachers import pixel

INPUTS = "inputs.json"
"""File of a run directory with the checksums of what the run was given."""


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
        self.data = build.image_set(config)
        self.reference = build.reference_set(config, self.data)
        self.distance = build.distance(config, place.device)
        self.inputs: dict[str, str | None] = {
            "data": self.data.digest(),
            "features": build.file_digest(config.evaluation.features),
            "lpips_weights": build.file_digest(config.distill.lpips_weights),
        }
        if config.evaluation.features is not None:
            build.feature_net(config, self.data)
        if config.teacher.teacher is None:
            build.check_architecture(config, self.data)
        else:
            self._load_teacher(Path(config.teacher.teacher))

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
        place.first(lambda: checkpoint.write_json(self.folder / "environment.json", build.environment(place)))
        teacher = self._teacher()
        if teacher is None:
            return self._say("stopped while teaching; the same command goes on")
        denoiser, architecture = teacher
        place.together(self.require_same_inputs)
        place.first(lambda: checkpoint.write_json(self.folder / INPUTS, self.inputs))
        real = build.guided(config, denoiser, architecture)
        store = self._pairs(real, denoiser, architecture)
        judge = self._judge(architecture)
        distiller = build.distiller(config, denoiser, real, place, self.distance)
        progress = self._distil(distiller, architecture, store, judge)
        if progress.step < config.distill.max_train_steps:
            return self._say(f"stopped after step {progress.step}; the same command goes on")
        if place.main:
            self._conclude(progress, real, architecture, judge)
        place.accelerator.wait_for_everyone()

    def _load_teacher(self, folder: Path) -> tuple[NetworkDenoiser, pixel.PixelConfig]:
        self.teacher_folder = folder
        teacher, architecture = build.load_teacher(self.config, self.data, self.place, folder)
        self.inputs["teacher"] = checkpoint.digest(teacher.net)
        return teacher, architecture

    def _teacher(self) -> tuple[NetworkDenoiser, pixel.PixelConfig] | None:
        """The teacher, taught first if there is none; None if teaching was stopped."""
        folder = build.teacher_folder(self.config, self.data)
        done = (folder / "model.safetensors").exists()
        self.place.accelerator.wait_for_everyone()
        given = self.config.teacher.teacher is not None
        if not done and not given and not build.teach(self.config, self.data, self.place, folder):
            return None
        return self.place.together(lambda: self._load_teacher(folder))

    def _pairs(self, real: Guided, teacher: NetworkDenoiser, architecture: pixel.PixelConfig) -> Pairs | None:
        if self.config.distill.objective == "matching":
            return None
        spec = build.pair_spec(self.config, teacher, architecture)
        return build.make_pairs(self.config, real, spec, self.place, build.pair_folder(self.config, spec))

    def _judge(self, architecture: pixel.PixelConfig) -> evaluation.Judge:
        """The feature network is trained (or loaded) by the main process first, so that the others find it cached."""
        self.place.first(lambda: build.feature_net(self.config, self.data))
        net = build.feature_net(self.config, self.data).to(self.place.device)
        reference = evaluation.Reference.of(self.reference, net)
        return evaluation.Judge(
            net, reference, pixel.labels, len(architecture.classes), architecture.shape, self.place.device,
            show=self.place.main,
        )  # fmt: skip

    def _distil(
        self, distiller: Distiller, architecture: pixel.PixelConfig, store: Pairs | None, judge: evaluation.Judge
    ) -> Progress:
        config, d = self.config, self.config.distill
        batches = build.distill_batches(config, architecture, store, self.place)
        average = build.ema_denoiser(distiller)

        def evaluate(step: int) -> dict[str, float]:
            if not self.place.main:
                return {}
            self._picture(distiller, average, batches(0).batches[0], step)
            return judge.in_loop(student_generator(average), config.evaluation.eval_samples)

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
            best="eval/fd",
            keep_best=lambda step: pixel.save(average.net.get_submodule("unet"), architecture, self.folder / "student"),
            sinks=build.sinks(config, self.folder),
        )
        return run.train()

    def _picture(self, distiller: Distiller, student: NetworkDenoiser, batch: Any, step: int) -> None:
        """samples/step-N.png: x, x0_real, x0_fake, y_ref (a row each) from the same noise at every evaluation."""
        z, y = (batch.z_ref, batch.y_ref) if len(batch.z_ref) else (batch.z, batch.z[:0])
        n = min(16, len(z))
        cond = {k: v[-len(z) :][:n] for k, v in batch.cond.items()}
        rows = evaluation.inspect(student, distiller.real, distiller.fake, z[:n], y[:n], cond, 0.5, z[:n].flip(0))
        named = [(r, t) for r, t in zip(rows, ("student", "x0_real", "x0_fake", "teacher"), strict=True) if len(r)]
        path = self.folder / "samples" / f"step-{step:08d}.png"
        evaluation.save_grid([r for r, _ in named], path, max(1, 32 // z.shape[-1]), [t for _, t in named])

    def _conclude(
        self, progress: Progress, real: Guided, architecture: pixel.PixelConfig, judge: evaluation.Judge
    ) -> None:
        """Compare the best student with its teacher, write summary.json, the pictures and the report."""
        from dmd import report

        config = self.config
        student, _ = pixel.load(self.folder / "student", self.place.autocast)
        student = student.to(self.place.device)
        generator, evaluations = build.many_step(config, real)
        figures, x_student, x_teacher = evaluation.compare(
            judge, student_generator(student), generator, config.evaluation.final_samples, evaluations
        )
        scale = max(1, 32 // architecture.size)
        shown = [x[: 2 * len(architecture.classes)] for x in (x_student, x_teacher)]
        evaluation.save_grid(shown, self.folder / "samples" / "final.png", scale, ("student", "teacher"))
        checkpoint.write_json(self.folder / "summary.json", self._summary(progress, figures, judge))
        self._say(f"{self._verdict(figures, judge)}\nreport: {report.write(self.folder)}")

    def _summary(self, progress: Progress, figures: dict[str, Any], judge: evaluation.Judge) -> dict[str, Any]:
        d = self.config.distill
        updates = progress.step
        critic = 0 if d.objective == "regression" else updates * d.critic_steps_per_generator_step
        per_step = (0 if d.objective == "regression" else d.batch_size) + (
            0 if d.objective == "matching" else d.pair_batch_size
        )
        teacher, student = figures["teacher"], figures["student"]
        return {
            "preset": self.config.preset,
            "objective": d.objective,
            "metric": judge.net.name,
            "reference_images": judge.reference.count,
            "samples": self.config.evaluation.final_samples,
            "wall_seconds": time.monotonic() - self.started,
            "distil_seconds": progress.seconds,
            "generator_updates": updates,
            "critic_updates": critic,
            "images_seen": updates * per_step,
            "best": progress.best,
            "teacher": teacher | {"folder": str(self.teacher_folder)},
            "student": student | {"folder": str(self.folder / "student")},
            "fd_ratio": student["fd"] / teacher["fd"],
            "speedup": student["images_per_second"] / teacher["images_per_second"],
            "accuracy": {"teacher": teacher["accuracy"], "student": student["accuracy"]},
        }

    def _verdict(self, figures: dict[str, Any], judge: evaluation.Judge) -> str:
        rows = [
            f"{'':8} {judge.net.name:>14} {'accuracy':>9} {'precision':>9} "
            f"{'recall':>7} {'diversity':>9} {'images/s':>9}"
        ]
        for who in ("teacher", "student"):
            f = figures[who]
            rows.append(
                f"{who:8} {f['fd']:14.4f} {f['accuracy']:9.4f} {f['precision']:9.3f} {f['recall']:7.3f} "
                f"{f['diversity']:9.4f} {f['images_per_second']:9.0f}"
            )
        student, teacher = figures["student"], figures["teacher"]
        rows.append(
            f"one step: {student['fd'] / teacher['fd']:.2f} times the teacher's distance, "
            f"{student['images_per_second'] / teacher['images_per_second']:.1f} times its speed"
        )
        return "\n".join(rows)

    def _say(self, text: str) -> None:
        if self.place.main:
            print(text, flush=True)
