"""The tools that Metis brings: `python`, `text_search`, `image_search`. Any other LangChain tool works as well.

- `python`, `text_search`, `image_search`: the tools; each is imported from its own module, so that one does not
  load what the others need
- `metered`: any tool with a time limit, retries, accounting (`usage`), a result `cache`, secrets out (`redaction`)
- `images`: safe loading of images; `download`: safe fetching, from the public internet only
- `deadline`: running code for so long and no longer
- `sandboxes` and `search`: what the tools stand on
"""
