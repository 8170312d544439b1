"""Which models of timm and open_clip work as teachers?

Claim: at least 90% of timm's architectures and all of open_clip's image towers do, at their own size, and none gives
silently other latents than the model itself. Every architecture is built on the meta device as `extract-targets` would:
its grid and widths, and whether every weight of a file of the model (with its head) is accounted for. Then values are
compared for one model of each kind (benchmarks/teacher_values.py). A row is written as soon as it is known, and a call
resumes where the last one ended.

    python -m benchmarks.teachers [--quick] [--rows FILE] [--share 0/2] [--out benchmarks/results/teachers-cpu.json]
    python -m benchmarks.teachers --end-to-end FOLDER    # ten teachers by CLI (benchmarks/teacher_tour.py)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch

from benchmarks import teacher_tour
from benchmarks.harness import at_least, at_most, finish, parse_options
from benchmarks.teacher_values import compare_open_clip, compare_timm, visual_tower
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers import open_clip, timm_weights
from cae2pipe.teachers import timm as teacher_timm
from cae2pipe.teachers.open_clip_towers import tower_shape

Row = dict[str, Any]


def main() -> None:
    options = parse_options(
        __doc__ or "",
        rows={"type": Path, "default": Path("teachers.jsonl"), "help": "file of rows, which a call resumes"},
        share={"default": "0/1", "help": "I/N: only the Ith of N equal parts of the models, for several processes"},
        **{"end-to-end": {"type": Path, "metavar": "FOLDER", "help": "run the CLI with ten teachers, in this folder"}},
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"timm|open_clip|torch")
    if options.end_to_end:
        teacher_tour.run(options.end_to_end, options)
        return
    measure(options, read_rows(options.rows))
    rows = list(read_rows(options.rows).values())
    shapes, values = ([row for row in rows if row["part"] == part] for part in ("shape", "values"))
    finish(
        options,
        "teachers",
        [family_row(*group) for group in grouped(shapes)],
        checks(shapes, values),
        {
            "shapes": {name_of(row): row["latents"] for row in shapes if row.get("works")},
            "refused": {name_of(row): row["reason"] for row in shapes if not row.get("works")},
            "values": [{key: row[key] for key in row if key not in ("part", "key")} for row in values],
        },
        ("torch", "timm", "open_clip_torch"),
    )


def read_rows(path: Path) -> dict[str, Row]:
    """Rows by their key; of repeated ones the last. A line cut off at the end is ignored."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["key"]] = row
    return rows


def measure(options: argparse.Namespace, known: dict[str, Row]) -> None:
    """Add to the file of rows what it lacks."""
    index, count = (int(part) for part in options.share.split("/"))
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    with options.rows.open("a") as file:

        def add(key: str, make: Callable[[], Row]) -> None:
            if key not in known:
                known[key] = {"key": key} | make()
                file.write(json.dumps(known[key]) + "\n")
                file.flush()

        with uninitialised():
            for number, (library, name) in enumerate(models(quick=options.quick)):
                if number % count == index:
                    shape = timm_shape if library == "timm" else open_clip_shape
                    add(f"shape {library} {name}", lambda shape=shape, name=name: shape(name))
        known |= read_rows(options.rows)
        shapes = [row for row in known.values() if row["part"] == "shape"]
        # The other shares' models may be the smallest of their kind.
        chosen = representatives(shapes) if len(shapes) >= len(models(quick=options.quick)) else []
        for number, row in enumerate(chosen):
            if number % count == index:
                compare = compare_timm if row["library"] == "timm" else compare_open_clip
                add(
                    f"values {name_of(row)}",
                    lambda row=row, compare=compare: {"part": "values", "kind": row["kind"]} | compare(row),
                )


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """On the meta device, half of a model's build is the initialisation of weights that have no values."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (timm.layers.weight_init, "_trunc_normal_"),
            *((torch.nn.init, name) for name in ("_no_grad_normal_", "_no_grad_uniform_", "_no_grad_trunc_normal_")),
            *((torch.nn.init, name) for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")),
            *((torch.nn.init, name) for name in ("uniform_", "normal_", "trunc_normal_", "constant_", "zeros_")),
        ):
            stack.enter_context(mock.patch.object(module, name, lambda tensor, *_, **__: tensor))
        yield


def models(*, quick: bool) -> list[tuple[str, str]]:
    """Library and name of every model: in turns of all series, so that a sweep that is cut off has seen each."""
    import open_clip as library

    series: dict[tuple[str, str], int] = {}
    found = []
    for kind, names in (("open_clip", library.list_models()), ("timm", timm.list_models())):
        for name in names:
            prefix = (kind, re.split(r"[^a-z]", name.lower(), maxsplit=1)[0])
            series[prefix] = series.get(prefix, -1) + 1
            found.append((series[prefix], kind, name))
    found.sort()
    return [(kind, name) for _, kind, name in (found[::40] if quick else found)]


def timm_shape(name: str) -> Row:
    """The row of an architecture of timm: without a stage if it gives tokens, else with the last feature map."""
    row: Row = {"part": "shape", "library": "timm", "name": name, "works": False}
    try:
        own, convert = timm_weights.draft(lambda: timm.create_model(name, pretrained=True))
    except Exception as error:  # whatever a model of timm raises when it is built
        return row | {"family": "?", "reason": f"timm cannot build it: {said(error, name)}"}
    config = own.pretrained_cfg
    row |= {
        "family": type(own).__module__.rpartition(".")[2],
        "parameters": sum(weight.numel() for weight in own.parameters()),
        "size": config["input_size"][-1],
        "kind": " ".join(
            (
                type(own).__name__,
                getattr(convert, "__name__", type(convert).__name__),
                f"pool={getattr(own, 'global_pool', '')}",
                f"class={getattr(own, 'cls_token', None) is not None}",
                f"norm={type(getattr(own, 'norm', None)).__name__}",
                f"projection={'clip' in name or 'pe_core' in name}",
            )
        ),
    }
    last = len(getattr(own, "feature_info", None) or ()) - 1
    tokens = all(hasattr(own, part) for part in ("num_prefix_tokens", "blocks", "norm"))
    reason = ""
    # A second build takes a second.
    for stage in (None, last) if tokens else (last,):
        settings = TeacherSettings(kind="timm", name=name, stage=stage)
        try:
            sketch, convert = teacher_timm.draft_model(settings)
            outputs = teacher_timm.model_outputs(sketch, settings)
            heads = set(own.state_dict())
            timm_weights.fitted(sketch, own.state_dict(), convert, heads=lambda heads=heads: heads, where=Path("file"))
        except TeacherError as error:
            # What it says about the feature map counts if there is one.
            reason = said(error, name)
        else:
            return row | {"works": True, "stage": stage, "latents": latents(outputs)}
    return row | {"reason": reason}


def open_clip_shape(name: str) -> Row:
    """The row of a model of open_clip."""
    row: Row = {"part": "shape", "library": "open_clip", "name": name, "works": False}
    settings = TeacherSettings(kind="open_clip", name=name)
    shape = tower_shape(settings)
    config = shape["vision_cfg"]
    with torch.device("meta"):
        tower = visual_tower(settings)
    inner = getattr(tower, "trunk", tower)
    pool = f"pool={getattr(inner, 'global_pool', getattr(inner, 'pool_type', ''))}"
    row |= {
        "family": f"timm's {type(inner).__module__.rpartition('.')[2]}" if inner is not tower else type(inner).__name__,
        "parameters": sum(weight.numel() for weight in tower.parameters()),
        "size": config["image_size"],
        "kind": f"{type(inner).__name__} {pool} {config.get('timm_proj', '')} {config.get('attentional_pool', '')}",
    }
    try:
        return row | {"works": True, "stage": None, "latents": latents(open_clip.latents_shape(settings))}
    except TeacherError as error:
        return row | {"reason": said(error, name)}


def latents(outputs: Any) -> str:
    """Grid and widths in a line, such as ``14 x 14 x 768, class token, summary 512``."""
    parts = [f"{outputs.rows} x {outputs.cols} x {outputs.dim}"]
    parts += ["class token"] if outputs.class_token else []
    parts += [f"summary {outputs.summary}"] if outputs.summary else []
    return ", ".join(parts)


def said(error: Exception, name: str) -> str:
    """What an error says, without the model's name."""
    text = error.what if isinstance(error, TeacherError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0].replace(f"{name} ", "").replace(name, "it")[:200]


def representatives(rows: Iterable[Row]) -> list[Row]:
    """Of the models that work, the smallest of each kind: class, filter of weights, pooling."""
    smallest: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["works"]:
            kind = (row["library"], row["kind"])
            best = smallest.setdefault(kind, row)
            if cost(row) < cost(best):
                smallest[kind] = row
    return sorted(smallest.values(), key=cost)


def cost(row: Row) -> float:
    return float(row["parameters"] * row["size"] ** 2)


def name_of(row: Row) -> str:
    return f"{row['library']} {row['name']}"


def grouped(shapes: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """Rows by library and family; a family is a module of timm, or a class of open_clip's towers."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in shapes:
        groups.setdefault((row["library"], row["family"]), []).append(row)
    return [(*group, groups[group]) for group in sorted(groups)]


def family_row(library: str, family: str, rows: list[Row]) -> Row:
    """How many of a family work, and why the others do not."""
    reasons = Counter(re.sub(r"\d+", "N", row["reason"]) for row in rows if not row["works"])
    return {
        "library": library,
        "family": family,
        "models": len(rows),
        "work": sum(row["works"] for row in rows),
        "tokens": sum(row["works"] and row["stage"] is None for row in rows),
        "refused": [[count, reason] for reason, count in reasons.most_common()],
    }


def checks(shapes: list[Row], values: list[Row]) -> list[Row]:
    """The goals of the claim."""
    share = {}
    for library in ("timm", "open_clip"):
        works = [row["works"] for row in shapes if row["library"] == library]
        share[library] = sum(works) / max(1, len(works))
    return [
        at_least("timm's architectures that work", share["timm"], 0.9),
        at_least("open_clip's towers that work", share["open_clip"], 1.0),
        at_most("compared models with other values, silently", sum(not row["equal"] for row in values), 0, 0),
        at_least("share of the kinds that have been compared", len(values) / max(1, len(representatives(shapes))), 1),
        at_least("compared models", len(values), 1, 0),
    ]


if __name__ == "__main__":
    main()
