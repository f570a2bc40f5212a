"""The tools that Metis brings: `python`, `text_search`, `image_search`. Any other LangChain tool works as well.

Each is imported from its own module, so that one does not load what the others need.
"""
