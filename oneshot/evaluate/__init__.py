"""Evaluation: one file, one kind of measurement. Each returns ({metric: value}, {metric: how it was measured})."""
