"""Tuning: numbers for every attention head, learned from questions through a torch twin of the model."""
