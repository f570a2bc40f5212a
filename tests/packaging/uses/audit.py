"""The audit knows what a call of a model costs."""

import genai_prices

from metis_agent.audit import accounting as money

assert genai_prices.__name__ == "genai_prices"
assert money.__doc__
