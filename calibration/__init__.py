"""Samples → ranges → scales."""
