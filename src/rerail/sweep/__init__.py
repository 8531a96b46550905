"""Sweeps: snapshot, submit, watch, cancel, collect; knows files and jobs, not models."""
