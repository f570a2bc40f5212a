"""What an agent's tool calls were for: probes of recorded runs, verdicts, redundant calls, their price, a page.

In flow order: `turns` reads recorded runs, `probes` asks the model to answer at each of their steps, `agreement` rules
on what it said, `accounting` counts, `estimates` and `frontier` measure, `money` prices, `page` shows. `run` is all of
it in one call. Import from those modules.
"""

__all__: list[str] = []
