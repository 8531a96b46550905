"""Stored forms: one file for each way in which a layer stores its experts."""
