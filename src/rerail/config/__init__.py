"""Configuration: presets by name, where Hydra looks, and what must stay secret."""
