"""Trainable policies of a gate: `features` here, others through the same `Policy` protocol (see `base`)."""

__all__: list[str] = []
