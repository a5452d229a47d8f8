"""Evaluation on labelled Mars datasets, and the report page."""
