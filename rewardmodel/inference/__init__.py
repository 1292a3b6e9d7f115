"""Trained runs and battles -> predictions."""
