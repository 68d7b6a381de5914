"""Small texts that stand for a file whose content was never fetched (Git LFS, git-annex)."""

from __future__ import annotations

_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_ANNEX = b"/annex/objects/"
_LONGEST_LINK = 256


def stand_in_for(head: bytes) -> str:
    """Return what the first bytes of a file say if they only stand for it, and what to do; else nothing."""
    if head.startswith(_LFS):
        return "a Git LFS pointer: the file itself was not fetched; run `git lfs pull`"
    if _ANNEX in head[:_LONGEST_LINK] and head[:1] in (b"/", b"."):
        return "a git-annex pointer: the file itself was not fetched; run `git annex get`"
    return ""
