"""Configuration: frozen dataclasses, presets, TOML. No torch."""
