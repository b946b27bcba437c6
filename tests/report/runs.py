"""Run directories as `dmd.chain` leaves them, without a run."""

import json

import torch

from dmd.config import preset
from dmd.evaluation import save_grid
from dmd.settings import to_json

STEPS, LOG, EVALUATE = 100, 5, 20
TEACHER = {
    "fd": 9.64414536682736, "precision": 0.705, "recall": 0.9259877, "density": 0.1, "coverage": 0.028,
    "brightness": -0.346, "contrast": 0.775, "count": 200.0, "accuracy": 0.715, "diversity": 0.2837, "nfe": 9,
    "images_per_second": 296.78,
}  # fmt: skip
STUDENT = TEACHER | {"fd": 9.961880678456666, "accuracy": 0.945, "nfe": 1, "images_per_second": 2375.484}
ROWS = ("x", "x0_real", "x0_fake", "student", "teacher")


def curves(objective="dmd", steps=STEPS):
    """Lines of metrics.jsonl."""
    for step in range(LOG, steps + 1, LOG):
        line = {"step": step, "grad/student": 0.3 + 1 / step, "seconds": step * 0.3}
        if objective != "regression":
            line |= {"loss/matching": 1e-8 * step**3, "loss/fake": 0.6, "grad/fake": 1.2}
            line |= {"health/normaliser": 0.15, "health/fake_real_gap": 2e-4 * step}
        if objective != "matching":
            line |= {"loss/regression": 1 / step}
        yield line
        if step % EVALUATE == 0:
            distance = 13 - step / 25 if step <= 60 else 12.0
            judged = {"eval/fd": distance, "eval/accuracy": 0.9, "eval/diversity": 0.2, "eval/count": 200.0}
            yield {"step": step, **judged, "health/brightness_drift": -0.01, "health/contrast_drift": -0.5}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(path, rows, count, size):
    images = [torch.rand(count, 1, size, size) * 2 - 1 for _ in rows]
    save_grid(images, path, max(1, 32 // size), rows)
    return images


def extremes(folder):
    """Four best and four worst of 200 samples; their images (best, worst), each of student and teacher."""
    facts = {"by": "distance from the teacher’s image", "samples": 200}
    images = []
    for k, name in enumerate(("best", "worst")):
        images.append(picture(folder / "samples" / f"{name}.png", ("student", "teacher"), 4, 8))
        facts[name] = [
            {"seed": 10 * k + i, "prompt": str(i), "score": 0.5, "remark": f"distance {i}.5"} for i in range(4)
        ]
    (folder / "samples" / "extremes.json").write_text(json.dumps(facts))
    return images


def make(folder, objective="dmd"):
    """A finished run as `dmd.chain` leaves it."""
    config = to_json(preset("digits"))
    config["distill"] |= {"objective": objective, "max_train_steps": STEPS}
    (folder / "student").mkdir(parents=True)
    for name, content in {
        "config.json": config,
        "environment.json": {
            "dmd": "0.1.0", "commit": None, "torch": "2.6", "processes": 1,
            "command": ["train_dmd.py", "--max-train-steps", "100"],
        },
        "student/config.json": {"size": 8, "classes": [str(i) for i in range(10)]},
        "summary.json": {
            "metric": "FD-SmallConvNet", "samples": 200, "reference_images": 1797, "generator_updates": STEPS,
            "critic_updates": STEPS, "images_seen": 12800, "wall_seconds": 81.3, "distil_seconds": 31.3,
            "teacher": TEACHER | {"folder": "t"}, "student": STUDENT | {"folder": "s"},
            "fd_ratio": STUDENT["fd"] / TEACHER["fd"], "speedup": 8.004,
        },
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(content))
    write_lines(folder / "metrics.jsonl", curves(objective))
    picture(folder / "samples" / "final.png", ("student", "teacher"), 20, 8)
    extremes(folder)
    for step in range(EVALUATE, STEPS + 1, EVALUATE):
        picture(folder / "samples" / f"step-{step:08d}.png", ROWS, 16, 8)
    return folder
