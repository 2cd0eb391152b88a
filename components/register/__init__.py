"""What a registered version holds, and how it is found again."""
