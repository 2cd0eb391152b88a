"""The registered bytes, proved in a clean process."""
