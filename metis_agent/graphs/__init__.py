"""The agent's graph: its state, its nodes, and how they are wired."""
