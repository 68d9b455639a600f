"""Samples made of a network alone, for calibration where no data is at hand."""
