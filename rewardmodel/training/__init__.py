"""Rows of tokens and a classifier -> trained weights."""
