"""Evaluation: exact test beds and measures of how much of a reward was recovered."""
