"""Curation: from everything that was recorded to what is worth learning from.

    store -> [sound] -> [answers] -> [leaks] -> [replay] -> [direct] -> [strategy] -> trajectories for SFT   (`sft`)
    store -> prompts -> [corrupted] -> [mix] -> [disagreement] -> [duplicates] -> [leaks] -> prompts for RL   (`rl`)

Each `[stage]` is a file: it says of each row keep, drop or undecided, and why. `pipeline` streams rows through them
in chunks, in bounded memory, and keeps every row that is dropped in a quarantine: in = kept + quarantined, always,
also after a kill -9. Import from those modules; this package imports nothing.

Source: arXiv:2604.08545, the data pipelines for the cold start and for RL.
"""

__all__: list[str] = []
