"""The name of a backbone -> a classifier on a device; rows of tokens -> logits."""
