"""`import rerail.auto` lets stock `from_pretrained` load checkpoints of the package form."""

from rerail.export.classes import register_families

register_families()
