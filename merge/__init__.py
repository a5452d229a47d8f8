"""Checkpoint selection (EVL) and model merging."""
