"""Battles -> rows of tokens: template, truncation, encoding, tokenization."""
