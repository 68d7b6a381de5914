"""A superpatch store: the public format, written, read, indexed, checked and explained. No torch."""
