"""What reads a question in a trained gate, one file a kind of policy: `features`, `encoder`, `decision_lm`."""

__all__: list[str] = []
