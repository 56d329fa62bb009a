"""Measures how fast a model decodes with 1 to N buckets here, beside llama.cpp's own limits, and its memory."""
