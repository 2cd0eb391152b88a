"""From a validated model to a portable graph that is equal to it."""
