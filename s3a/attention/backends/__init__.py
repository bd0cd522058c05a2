"""The backends: how each lays out a pass, and how it attends."""
