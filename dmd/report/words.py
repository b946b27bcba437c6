"""What the page says in sentences."""

from collections.abc import Iterator
from typing import Any

from dmd.plots import duration, number, show
from dmd.report.files import RunFiles


def headline(run: RunFiles) -> str:
    ratio, speed = number(run.summary.get("fd_ratio")), number(run.summary.get("speedup"))
    if run.finished and ratio is not None and speed is not None:
        ours, theirs = (number(run.final(who).get("caption_agreement")) for who in ("student", "teacher"))
        shows = f"{ours:.1%} of images show their caption (teacher: {theirs:.1%}), " if ours and theirs else ""
        return (
            f"At one step, {shows}the student’s distance is {show(ratio)} times its teacher’s, and it is "
            f"{speed:.1f} times as fast."
        )
    if run.finished:
        return "The run is finished."
    total, best = number(run.option("distill", "max_train_steps")), run.best()
    if run.last_step == 0:
        return "This run is not finished: it has not begun to distil."
    done = f"step {run.last_step:,}" + (f" of {show(total)}" if total else "")
    text = f"This run is not finished: it has reached {done}."
    so_far = "last" if run.keeps_last else "best"
    return text + (f" The {so_far} distance so far is {show(best[1])}, at step {best[0]:,}." if best else "")


OBJECTIVES = {"dmd": "matching and regression", "matching": "matching only", "regression": "regression only"}


def facts(run: RunFiles) -> list[str]:
    """What was done, in a few short pieces."""
    objective = run.option("distill", "objective")
    found = [
        f"preset {run.config['preset']}" if isinstance(run.config.get("preset"), str) else None,
        OBJECTIVES.get(objective) if isinstance(objective, str) else None,
        _count(run.summary.get("generator_updates"), "generator updates"),
        _count(run.summary.get("critic_updates"), "critic updates"),
        _count(run.summary.get("images_seen"), "images seen"),
    ]
    distil, wall = number(run.summary.get("distil_seconds")), number(run.summary.get("wall_seconds"))
    if distil is None and run.metrics.get("seconds"):
        distil = run.metrics["seconds"][-1][1]
    if distil is not None:
        found.append(
            f"{duration(distil)} of distillation" + (f", {duration(wall)} in all" if wall and wall >= distil else "")
        )
    return [f for f in found if f]


def _count(value: Any, what: str) -> str | None:
    found = number(value)
    return None if found is None else f"{show(found)} {what}"


def cautions(run: RunFiles) -> Iterator[str]:
    """What the headline alone would hide."""
    teacher, student = run.final("teacher"), run.final("student")
    poor = []
    for name in ("recall", "diversity"):
        ours, theirs = number(student.get(name)), number(teacher.get(name))
        if ours is not None and theirs is not None and ours < theirs / 2:
            poor.append(f"{name} {ours:.3f} against {theirs:.3f}")
    if poor:
        figures = ", ".join(poor)
        yield f"The student is much less varied than its teacher ({figures}). The distance alone does not show this."
    series, best = run.metrics.get("eval/fd", []), run.best()
    if run.finished and not run.keeps_last and best and len(series) > 2 and best[0] == series[-1][0]:
        yield (
            "The last evaluation was the best, so the student may still be improving: "
            "the same command with a larger --max-train-steps goes on from here."
        )
    updates = number(run.summary.get("generator_updates"))
    if updates is not None and run.last_step > updates:
        yield (
            f"The run has gone on to step {run.last_step:,} since its final figures were taken at step "
            f"{show(updates)}; they are renewed when it ends."
        )
    if (run.folder / "summary.json").exists() and not run.finished:
        yield "summary.json could not be read."
    if run.damaged_lines:
        lines = "1 line" if run.damaged_lines == 1 else f"{run.damaged_lines:,} lines"
        yield f"{lines} of metrics.jsonl could not be read and {'is' if run.damaged_lines == 1 else 'are'} left out."


def comparison_caption(run: RunFiles) -> str:
    text = "Each column starts from the same noise."
    nfe = number(run.final("teacher").get("nfe"))
    if nfe:
        text += f" The student evaluates its network once, the teacher {show(nfe)} times."
    classes = run.student.get("classes")
    if isinstance(classes, list) and 1 < len(classes) <= 12:
        text += f" Classes in turn: {', '.join(map(str, classes))}."
    if run.option("evaluation", "test_prompts") is not None:
        text += " Its captions are those of --test-prompts, not of training."
    return text


def prompts(run: RunFiles) -> list[str]:
    """What the compared images were asked for, column by column; none for classes."""
    found = run.summary.get("prompts")
    return [str(p) for p in found] if isinstance(found, list) else []


def extremes_note(run: RunFiles) -> str:
    """By what the best and worst samples were chosen."""
    by, samples = run.extremes.get("by"), number(run.extremes.get("samples"))
    chosen = f"Of {show(samples)} samples, " if samples else ""
    order = f"{chosen}ordered by the {by}." if isinstance(by, str) else chosen.rstrip(", ") + "."
    return (
        f"{order[:1].upper()}{order[1:]} The student is on the left, its teacher on the right, from the same noise. A "
        "student need not follow its teacher noise by noise, so look whether the worst are bad or only different."
    )
