"""Rollouts: questions run down every branch, recorded, and what came of each branch as a table."""
