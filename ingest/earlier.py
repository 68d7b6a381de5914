"""What earlier runs into the same store have made of a source: a volume, a refusal, or the copy of another volume."""

from __future__ import annotations

from dataclasses import dataclass

from maesil.ingest.failures import MAY_PASS
from maesil.ingest.options import IngestOptions
from maesil.ingest.plan_tables import Item
from maesil.store.recipe import Recipe
from maesil.store.records import Refusal, Volume
from maesil.store.store import Store


@dataclass(frozen=True)
class EarlierRuns:
    """The records of a store, asked whether they still hold for a source."""

    store: Store
    recipe: Recipe
    options: IngestOptions

    def made(self, live: Volume | None, item: Item) -> bool:
        """Return whether the live volume is what would be made again."""
        if live is None or self.options.force:
            return False
        return (live.source_hash, live.recipe_hash) == (item.source_hash, self.recipe.hash)

    def refused(self, refusal: Refusal, item: Item) -> bool:
        """Return whether this very source was refused, and would be again."""
        if (refusal.source_hash, refusal.recipe_hash) != (item.source_hash, self.recipe.hash):
            return False
        again = (*MAY_PASS, "duplicate_pixels", *self.options.retry_quarantined)
        return not self.options.force and refusal.code not in again and "all" not in again

    def copied(self, refusal: Refusal, item: Item) -> str:
        """Return the volume that was found to hold the pixels of this source, if it still does; else nothing."""
        if refusal.code != "duplicate_pixels" or refusal.source_hash != item.source_hash or not refusal.numbers:
            return ""
        holder = self.store.live(refusal.numbers["same_as"])
        return holder.volume_id if holder and holder.recipe_hash == self.recipe.hash else ""
