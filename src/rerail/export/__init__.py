"""Checkpoints of students: one target a file, over shared ways to densify, write and reload."""
