"""Samples for verification: what a model is asked, and what the right answers are."""
