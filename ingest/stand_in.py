"""Small texts that stand for a file whose content was never fetched (Git LFS, git-annex, a download that failed)."""

from __future__ import annotations

_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_ANNEX = b"/annex/objects/"
_LONGEST_LINK = 256


_PAGES = (b"<!doctype html", b"<html", b"<error>", b'<?xml version="1.0" encoding="utf-8"?><error>')
"""What servers send in place of a file, without white space between elements."""
_NAMES_OF_PAGES = (".html", ".htm", ".xhtml", ".xml")


def stand_in_for(head: bytes, name: str = "") -> str:
    """Return what the first bytes of a file say if they only stand for it, and what to do; else nothing."""
    if head.startswith(_LFS):
        return "a Git LFS pointer: the file itself was not fetched; run `git lfs pull`"
    if _ANNEX in head[:_LONGEST_LINK] and head[:1] in (b"/", b"."):
        return "a git-annex pointer: the file itself was not fetched; run `git annex get`"
    page = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().replace(b">\r\n", b">").replace(b">\n", b">")
    if page.startswith(_PAGES) and "." in name and not name.lower().endswith(_NAMES_OF_PAGES):
        return "a web page in place of the file: a download that failed; get the file again"
    return ""
