"""Is an answer right? Rules that compare it with a reference, and LLM judges where no rule can."""
