"""YAML and command-line overrides -> a `Recipe`."""
