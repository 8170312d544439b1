"""How a target set was made, in words, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cae2pipe.artifacts.manifest_values import UNKNOWN
from cae2pipe.config.extract import ViewSettings

Rows = list[tuple[str, str]]


def teacher_rows(identity: Mapping[str, Any], facts: Mapping[str, Any]) -> Rows:
    """The teacher. ``identity`` and ``facts`` are the manifest's."""
    made, seen, settings = identity["teacher"], facts["teacher"], identity["settings"]["teacher"]
    averaged = ", averaged by area to this grid," if settings.get("grid") else ""
    patches = f"{seen['rows']} × {seen['cols']} patches{averaged}"
    size = made.get("image_size", settings.get("image_size"))
    return [
        ("teacher", f"{made['name']}, of {made['library']}"),
        ("weights", made["weights"]),
        ("latents", f"{patches}{' and a class token' if seen['class_token'] else ''}, {seen['dim']} dimensions each"),
        *([("summary", f"a summary of {seen['summary']} dimensions")] if "summary" in seen else []),
        *([("layers", ", ".join(f"block {layer}" for layer in seen["layers"]))] if "layers" in seen else []),
        (
            "attention",
            "the class token's, stored for each patch" if seen["attention"] else "not available from this teacher",
        ),
        *([("teacher's input", f"{size} × {size} pixels")] if size else []),
        *([("precision", str(made["precision"]))] if "precision" in made else []),
        *licence_rows(facts.get("licences", {})),
    ]


def licence_rows(licences: Mapping[str, object]) -> Rows:
    """The licences of the teacher's weights and of the images, or that they are unknown."""
    return [
        ("licence of the teacher", str(licences.get("teacher", UNKNOWN))),
        ("licence of the images", str(licences.get("data", UNKNOWN))),
    ]


def view_rows(view: ViewSettings, seed: object, *, by_reference: bool = False) -> Rows:
    """How views are drawn and stored."""
    low, high = view.scale
    narrow, wide = view.ratio
    crops = f"crops of {low:.0%} to {high:.0%} of the image, {narrow:.3g} to {wide:.3g} times as wide as high"
    replayed = view.pixels == "replayed"
    kept = "each image once; views are cropped from it when they are loaded" if replayed else "each view"
    kept += ", in another target set" if by_reference else ""
    return [
        ("views", f"{view.size} × {view.size} pixels, {crops}"),
        ("augmentation", f"flipped with probability {view.flip:g}, colour jitter {view.jitter:g}"),
        ("stored pixels", f"{kept}; JPEG quality {view.quality}, {view.subsampling}"),
        ("seed", str(seed)),
    ]


def codec_rows(identity: Mapping[str, Any], facts: Mapping[str, Any]) -> Rows:
    """The codec, and that of the set from which it was recoded."""
    codec = identity["settings"]["codec"]
    step = facts.get("codec", {}).get("step")
    rows = [("codec", codec["name"] + (f", step {step:.4g}" if step else ""))]
    if "recoded" in identity:
        before = identity["recoded"]["codec"]
        rows.append(("recoded", f"from a set with codec {before.get('name', 'unknown')}"))
    return rows


def provenance_rows(facts: Mapping[str, Any], *, format: int, fingerprint: str) -> Rows:
    """The versions and the processor that the bytes depend on, and what identifies the set."""
    # A recoded set records its source's extraction separately.
    extracted = facts.get("extracted", facts)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(extracted.get("versions", {}).items()))
    return [
        ("extracted with", versions or "not recorded"),
        ("extracted on", extracted.get("processor", "not recorded")),
        ("format", str(format)),
        ("fingerprint", fingerprint),
    ]
