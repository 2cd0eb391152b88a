"""WHAT runs, and in which order."""
