"""WHY the result is right: plain Python, testable without a server."""
