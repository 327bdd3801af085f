"""Penstock: serve open-weight language models to many people at once."""
