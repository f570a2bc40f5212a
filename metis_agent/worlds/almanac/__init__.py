"""The almanac: an offline world of questions, a corpus, noisy tools, and a tiny language model.

Everything is derived from seeds, so no data file is needed but the trained cold start.
"""
