"""Checks that a trained model must pass before it may be exported."""
