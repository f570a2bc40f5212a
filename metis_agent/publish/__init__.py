"""Trained gates and policies for others: a folder with a model card, pushed to a hub.

The card says what was measured, on which data, what is promised, and how to load it.
"""

from metis_agent.publish.push import CardFacts, Publication, model_card, push_to_hub, save_pretrained

__all__ = ["CardFacts", "Publication", "model_card", "push_to_hub", "save_pretrained"]
