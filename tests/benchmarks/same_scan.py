"""How well changed copies of scans are told from other patients, and how long that takes.

    python tests/benchmarks/same_scan.py STORE

Each volume of the store is changed in all ways of ``tests/support/copies.py``. The table says in how many volumes a
copy is known again. The lines below it say which patients of the store are taken for one, and the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.copies import COPIES

from maesil.ingest.maps import body_map
from maesil.store.duplicates import merge_groups, same_scan
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.store.thumbnails import thumbnail, thumbnails
from maesil.types import HuArray, Spacing


def thumbnail_of(hu: HuArray, spacing: Spacing) -> np.ndarray:
    """Return the thumbnail that ingest would write."""
    hu = np.ascontiguousarray(hu)
    return thumbnail(hu, body_map(hu, np.full([-(-n // 8) for n in hu.shape], 255, np.uint8), spacing), spacing)


def print_copies(store: Store) -> None:
    """Print for each change how many volumes are known again."""
    reader, known = SuperpatchReader(store), dict.fromkeys(COPIES, 0)
    for volume in reader.volumes.values():
        hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
        whole = thumbnail_of(hu, volume.spacing)
        for name, change in COPIES.items():
            known[name] += same_scan(whole, thumbnail_of(change(hu), volume.spacing))
    print("| change | known again | of |\n| --- | --- | --- |")
    for name, count in known.items():
        print(f"| {name} | {count} | {len(reader.volumes)} |")


def print_others(store: Store) -> None:
    """Print which patient groups of the store are taken for one, and how long that took."""
    found, group_of = thumbnails(store), {volume.volume_id: volume.group for volume in store.volumes()}
    start = time.perf_counter()
    merged = merge_groups([group_of[volume_id] for volume_id in found], list(found.values()))
    seconds = time.perf_counter() - start
    joined = sorted((group, leader) for group, leader in merged.items() if group != leader)
    pairs = len(found) * (len(found) - 1) // 2
    print(f"\n{len(found)} volumes, {pairs} pairs, {seconds:.1f} s; taken for one patient: {joined or 'none'}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store", type=Path)
    store = Store.open(parser.parse_args().store)
    print_others(store)
    print_copies(store)


if __name__ == "__main__":
    main()
