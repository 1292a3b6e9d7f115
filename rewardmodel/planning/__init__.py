"""A recipe and a device -> memory, time and problems, before anything is loaded."""
