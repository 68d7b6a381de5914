"""Reading superpatches back: from the commit's byte offsets to a caller's buffer."""
