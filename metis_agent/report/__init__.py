"""The report: one HTML page that says what a gate saved, what that cost in accuracy, and shows every decision.

In flow order: `runs` reads a store in one pass, `figures` makes the numbers of it, `archive` packs single runs for
the page's browser, `charts` and `sections` draw, `page` puts it together. Import from those modules.
"""

__all__: list[str] = []
