"""The same golden file through other engines, each in a process of its own."""
