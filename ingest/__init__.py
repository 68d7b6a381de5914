"""From folders of DICOM and NIfTI to a superpatch store, through Dask.

The package can be called, since ``maesil.ingest`` is a function of the public interface and a folder at once:

    summary = maesil.ingest("scans", "store.zarr")
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maesil.ingest.options import IngestOptions
    from maesil.ingest.summary import Summary
    from maesil.store.recipe import Recipe
    from maesil.store.urls import StorePlace


class Ingest(ModuleType):
    """The kind of this package: a module that can be called."""

    def __call__(
        self,
        sources: StorePlace | str | Sequence[StorePlace | str],
        out: StorePlace | str,
        *,
        recipe: Recipe | None = None,
        options: IngestOptions | None = None,
    ) -> Summary:
        """Turn all CT below ``sources`` into volumes of the store at ``out``, as the command ``maesil ingest`` does.

        Sources and store are paths or URLs (``s3://``, ``gs://``, ``az://``).
        ``recipe`` (`maesil.store.recipe.Recipe`) says what becomes of the voxels: the spacing in mm, the codec.
        ``options`` (`maesil.ingest.options.IngestOptions`) say how the work runs. Volumes that are already there from
        the same source and recipe are left alone. The summary lists one verdict per file found.

        Workers are processes of their own. So a script calls this below ``if __name__ == "__main__":``, or asks for
        ``IngestOptions(workers=0)``. Raises NoInputError, UsageError, StoreError and ResourceError.
        """
        from maesil.ingest.run import ingest
        from maesil.store.urls import ObjectUrl, place_of

        listed = [sources] if isinstance(sources, Path | ObjectUrl | str) else sources
        return ingest([place_of(source) for source in listed], place_of(out), recipe, options)


sys.modules[__name__].__class__ = Ingest
