"""Weights: folders, the Hub, model cards, and conversion of official checkpoints."""
