"""Numerics that several templates and methods share."""
