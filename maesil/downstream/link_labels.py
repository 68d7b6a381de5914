"""From the names of a data set to the names of a store: label files linked under the ids of their volumes.

A store knows no path. The report of an ingest does (``files.parquet``), so that the label of a scan can be found by how
its path is written.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from maesil.errors import NoInputError, UsageError
from maesil.files import make_folder
from maesil.ingest.report_folder import read_noted
from maesil.ingest.source_path import SourcePath
from maesil.text import counted


@dataclass(frozen=True)
class Linked:
    """What `link_labels` did."""

    volumes: int
    """Volumes that have a label now."""
    without: tuple[str, ...]
    """Volumes whose label file does not exist."""
    shared: tuple[tuple[str, int], ...]
    """Label files of several volumes, and of how many: right only where ingest made several volumes of one scan."""


def link_labels(report: Path, out: Path, image: str, label: str) -> Linked:
    r"""Make links ``VOLUME_ID.nii.gz`` (a folder of masks: ``VOLUME_ID``) in ``out`` to the labels of ingested files.

    Where the regular expression ``image`` is found in the path of a used file, it is replaced by ``label`` (``\1`` for
    groups), and the result is the path of its label. UsageError where one volume would get two labels, or nothing fits;
    NoInputError without the report.
    """
    wanted = _label_paths(_used_files(report), image, label)
    make_folder(out)
    without, users = [], Counter[str]()
    for volume_id, path in sorted(wanted.items()):
        if not path.exists():
            without.append(volume_id)
            continue
        _link(out / f"{volume_id}{_suffix(path)}", path.resolve())
        users[str(path)] += 1
    if not users:
        example = next(iter(wanted.values()))
        near = [name for suffix in (".nii.gz", ".nii") if Path(name := f"{example}{suffix}").exists()]
        raise NoInputError(
            f"expected labels such as {example}, found none of {len(wanted)}{f', but {near[0]}' if near else ''}; "
            "look at --image and --label"
        )
    shared = tuple((path, volumes) for path, volumes in users.items() if volumes > 1)
    return Linked(users.total(), tuple(without), shared)


def _used_files(report: Path) -> list[tuple[SourcePath, str]]:
    path = report / "files.parquet" if report.is_dir() else report
    if not path.exists():
        raise NoInputError(f"{path}: expected the files.parquet of an ingest's report, found none")
    try:
        verdicts = [noted.verdict for noted in read_noted(path)]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise NoInputError(f"{path}: expected the files.parquet of an ingest's report, found it damaged") from error
    used = [verdict for verdict in verdicts if verdict.status == "used"]
    return [(verdict.path, volume_id) for verdict in used for volume_id in verdict.volume_ids]


def _label_paths(files: list[tuple[SourcePath, str]], image: str, label: str) -> dict[str, Path]:
    try:
        pattern = re.compile(image)
        found: dict[str, set[Path]] = defaultdict(set)
        for path, volume_id in files:
            if pattern.search(str(path)):
                found[volume_id].add(Path(pattern.sub(label, str(path))))
    except re.error as error:
        raise UsageError(f"--image {image!r}, --label {label!r}: expected a regular expression ({error})") from error
    if not found:
        example = f", for example {files[0][0]}" if files else ""
        raise UsageError(f"--image {image!r}: found in the path of none of {counted(len(files), 'used file')}{example}")
    for volume_id, paths in found.items():
        if len(paths) > 1:
            one, other, *_ = sorted(map(str, paths))
            raise UsageError(
                f"volume {volume_id}: expected one label, found {one} and {other}; "
                "write --image so that all files of a volume lead to the same"
            )
    return {volume_id: paths.pop() for volume_id, paths in found.items()}


def _suffix(path: Path) -> str:
    if path.is_dir():
        return ""
    return ".nii.gz" if path.name.endswith(".gz") else ".nii"


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.resolve() == target:
        return
    if link.exists() or link.is_symlink():
        raise UsageError(f"{link}: is there already and is no link to {target}; name another --out")
    link.symlink_to(target, target_is_directory=target.is_dir())
