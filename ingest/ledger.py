"""The ledger of an ingest: one verdict on every file, the refused sources, and what the store holds beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from maesil.errors import MaesilError, Refused
from maesil.ingest.failures import json_ready
from maesil.ingest.plan import VolumePlan
from maesil.ingest.plan_tables import PlanOnDisk
from maesil.ingest.privacy import IdentityKey, without_paths
from maesil.ingest.source_path import SourcePath
from maesil.ingest.summary import Summary
from maesil.ingest.verdict import OTHER_PARTITION, FileVerdict, Status
from maesil.store.recipe import Recipe
from maesil.store.records import Refusal, Volume
from maesil.store.store import Store


class Ledger:
    """What becomes of the files of a run, as it becomes known. Refusals go into the store's quarantine at once."""

    def __init__(self, store: Store, recipe: Recipe, key: IdentityKey, summary: Summary) -> None:
        self.summary = summary
        self._store, self._recipe, self._key = store, recipe, key
        self.files = summary.files
        self._refused: set[str] = set()
        """Ids of the sources that this run refused, or found refused."""
        self._recorded = {record.volume_id for record in store.quarantined()}
        """Ids in the store's quarantine: to remove a record that is not there costs requests, too."""
        self._elsewhere: set[str] = set()
        """What volumes that other parts of the work make are known by: their ids, and the hashes of their places."""

    def open_with(self, plan: PlanOnDisk) -> None:
        """Write down what the plan has decided already."""
        self.summary.damaged_files = plan.damaged_files
        self.files.extend(plan.other_files)
        for left in plan.left_out():
            volume_id = None
            if (series := left.refused()) is not None:
                volume_id = self._key.hash("volume", series.identity)
                self._quarantine(volume_id, series.refusal, series.paths)
            self.files.extend(replace(verdict, volume_id=volume_id) for verdict in left.verdicts())

    def leave_to_others(self, plan: VolumePlan) -> None:
        """Leave a volume to another part of the work: what is in the store of it does not come from nowhere."""
        self.verdict(plan, "skipped", OTHER_PARTITION, None)
        if plan.identity is not None:
            self._elsewhere.add(self._key.hash("volume", plan.identity))
        self._elsewhere.add(self._key.hash("path", str(plan.source.place.absolute())))

    def verdict(self, plan: VolumePlan, status: Status, code: str, volume_id: str | None, detail: str = "") -> None:
        """Give all files of a volume one verdict."""
        self.files.extend(FileVerdict(path, status, code, volume_id, detail) for path in plan.source.paths)

    def refuse(self, plan: VolumePlan, volume_id: str, refusal: Refused, source_hash: str = "") -> None:
        """Put a source into quarantine."""
        self._quarantine(volume_id, refusal, plan.source.paths, source_hash)
        self.verdict(plan, "quarantined", refusal.code, volume_id, refusal.detail)

    def refused_before(self, plan: VolumePlan, record: Refusal) -> None:
        """Leave a source in quarantine, by the record of an earlier run."""
        self.summary.refused_volumes += 1
        self._refused.add(record.volume_id)
        self.verdict(plan, "quarantined", record.code, record.volume_id, record.detail)

    def leave_out(self, plan: VolumePlan, volume_id: str, copy: Volume, holder: str) -> None:
        """Discard a finished attempt that holds the pixels of another volume; remember it for the next run."""
        self._store.storage.remove(copy.prefix)
        self.verdict(plan, "skipped", "duplicate_pixels", holder)
        self._store.quarantine(
            Refusal(
                volume_id, "duplicate_pixels", f"the pixels of {holder}", {"same_as": holder},
                recipe_hash=self._recipe.hash, source_hash=copy.source_hash, files=len(plan.source.paths),
            )
        )  # fmt: skip

    def release(self, plan: VolumePlan, volume_id: str) -> None:
        """Drop the records of earlier refusals of what is a volume now."""
        names = {volume_id} if plan.identity is not None else {volume_id, self.provisional_id(plan)}
        for name in names & self._recorded:
            self._store.release(name)

    def provisional_id(self, plan: VolumePlan) -> str:
        """Return the id under which a source is refused whose content, its identity, could not be read."""
        several = f" {plan.source.planes}" if plan.source.kind == "nifti" and plan.source.planes else ""
        return self._key.hash("volume", plan.identity or plan.source.name + several)

    def forget_absent(self) -> None:
        """Make the store hold what these sources alone would have made."""
        known = {volume.volume_id for volume in self.summary.volumes}
        for volume in self._store.volumes():
            if volume.volume_id not in known:
                self._store.forget(volume.volume_id)
        for record in self._store.quarantined():
            if record.volume_id not in self._refused:
                self._store.release(record.volume_id)

    def close(self, plan: PlanOnDisk) -> None:
        """Bring the verdicts down to one per file, see that none is missing, and look at the rest of the store."""
        self.files.settle()
        self._require_all_accounted_for(plan)
        self._compare_with_store()

    def _require_all_accounted_for(self, plan: PlanOnDisk) -> None:
        """Every file found must have met exactly one verdict: a lost volume must never pass for a finished run."""
        planned = (path for item in plan.volumes for path in item.source.paths)
        if not self.files.are_one_for_each(chain((verdict.path for verdict in plan.verdicts), planned)):
            raise MaesilError(
                f"expected a verdict on each file that was found, found {len(self.files)} verdicts on others; "
                "run the same command again, and report this"
            )

    def _compare_with_store(self) -> None:
        known = {volume.volume_id for volume in self.summary.volumes}
        live = self._store.volumes()
        elsewhere = self._elsewhere
        self.summary.absent = sum(
            not (v.volume_id in known or v.volume_id in elsewhere or v.source_path in elsewhere) for v in live
        )
        self.summary.outdated = [volume.volume_id for volume in self._store.outdated()]
        same: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for volume in live:
            same[volume.pixels].append(volume.volume_id)
        self.summary.duplicates = sorted(ids for ids in same.values() if len(ids) > 1)

    def _quarantine(
        self, volume_id: str, refusal: Refused, paths: Sequence[SourcePath], source_hash: str | None = None
    ) -> None:
        self.summary.refused_volumes += 1
        self._refused.add(volume_id)
        detail = without_paths(refusal.detail, paths)
        numbers = {
            name: without_paths(value, paths) if isinstance(value, str) else value
            for name, value in json_ready(refusal.numbers).items()
        }
        self._recorded.add(volume_id)
        self._store.quarantine(
            Refusal(volume_id, refusal.code, detail, numbers, self._recipe.hash, source_hash, len(paths))
        )
