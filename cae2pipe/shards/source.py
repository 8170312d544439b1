"""Recognises the form of a source of images: a folder, an archive, WebDataset tars, a list."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.artifact import is_artifact
from cae2pipe.artifacts.storage import file_size
from cae2pipe.errors import SourceError
from cae2pipe.shards.archive import scan_archive, scan_tars
from cae2pipe.shards.entries import Source
from cae2pipe.shards.folder import FIX_SOURCE, find_images, folder_splits, list_files, refuse_no_folder, scan_folder
from cae2pipe.shards.ground_truth import DEVKIT, read_ground_truth, with_ground_truth
from cae2pipe.shards.kinds import is_image, is_tar
from cae2pipe.shards.path_list import SUFFIX, scan_list

IMAGENET = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
"""The official archives by split."""


def scan(root: Path, labels: Path | None = None) -> Source:
    """The images of a source of any form, on a disk or behind a URL.

    Args:
        root: a folder of images, an archive, a folder of tars, or a list of paths.
        labels: ground truth for images without classes. The development kit of ImageNet's validation archive is
            used automatically if it is in the same folder.

    Raises:
        SourceError: what is wrong with the source, and where.
    """
    if is_artifact(root):
        raise SourceError(
            "this folder was made by cae2pipe",
            where=root,
            fix="give the images themselves; shard sets need no sharding",
        )
    source = _scan(root)
    if labels is None and root.name == IMAGENET["val"]:
        labels = root.parent / DEVKIT
        if file_size(labels) is None:
            raise SourceError(
                "the classes of ImageNet's validation images are not in their archive",
                where=root,
                fix=f"give its ground truth: --labels {DEVKIT} (or put that file next to the archive)",
            )
    return source if labels is None else with_ground_truth(source, read_ground_truth(labels))


def _scan(root: Path) -> Source:
    try:
        if file_size(root) is not None:
            if is_tar(root.name):
                return scan_archive(root)
            if root.name.lower().endswith(SUFFIX):
                return scan_list(root)
            raise SourceError("this file is neither a .tar nor a .txt list", where=root, fix=FIX_SOURCE)
        refuse_no_folder(root)
        files, hidden = list_files(root)
        images = find_images(root, files)
        tars = [name for name in files if is_tar(name)]
        if not tars or images or folder_splits(root, files):
            return scan_folder(root, files, images, hidden=hidden)
        if deeper := sorted(name for name in tars if "/" in name):
            raise SourceError(
                f"there are tars in subfolders of this folder: {deeper[0]}",
                where=root,
                fix="give the folder that directly contains them",
            )
        return scan_tars(root, tars, sorted(files.keys() - set(tars)))
    except OSError as error:
        raise SourceError(
            f"this source cannot be read: {error.strerror or error}",
            where=error.filename or root,
            fix="fix its permissions",
        ) from None


def find_splits(root: Path) -> dict[str, Path]:
    """The splits of a folder, by name: its subfolders train, val, ...; or ImageNet's official archives. {} if none.

    Raises:
        SourceError: the folder does not exist or cannot be read.
    """
    if file_size(root) is not None:
        return {}
    refuse_no_folder(root)
    files, _ = list_files(root)
    archives = {split: name for split, name in IMAGENET.items() if name in files}
    if archives and not any(map(is_image, files)):
        return {split: root / name for split, name in archives.items()}
    return {name: root / name for name in folder_splits(root, files)}
