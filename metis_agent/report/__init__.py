"""The report: one HTML page that says what a gate saved, what that cost in accuracy, and shows every decision.

In flow order: `figures` reads a store in one pass and makes the numbers of it, `transcript` packs single runs for
the page's browser, `charts` and `sections` draw, `page` puts it together. Import from those modules.
"""

__all__: list[str] = []
