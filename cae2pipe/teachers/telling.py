"""What the log says about a teacher."""

from __future__ import annotations

from cae2pipe.teachers.protocol import Teacher


def teacher_lines(teacher: Teacher) -> list[str]:
    """One line on what the teacher is given and gives, and one more if something about its weights is assumed."""
    info = teacher.info
    own = f" (its own {teacher.native})" if teacher.native not in (None, info.image_size) else ""
    latents = f"{info.rows} x {info.cols} x {info.dim}" + (" + class token" if info.class_token else "")
    latents += f" + summary of {info.summary}" if info.summary else ""
    latents += f", also after blocks {', '.join(map(str, info.layers))}" if info.layers else ""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (info.mean, info.std))
    parts = [f"{info.name}, {info.image_size} px{own}", latents, f"mean {mean}", f"std {std}", info.precision]
    parts.append("attention" if teacher.attends else "no attention")
    lines = [f"teacher: {', '.join(parts)}"]
    if teacher.assumed:
        lines.append(
            f"teacher: the {teacher.assumed} of these weights are assumed: no configuration next to the file, no tag "
            "(teacher.pretrained) and no setting says otherwise"
        )
    return lines
