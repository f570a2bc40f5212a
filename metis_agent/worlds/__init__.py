"""Closed worlds in which an agent can be trained and judged without a network, a key or a GPU."""
