"""Devices, published measurements and claims as data, read into strict models."""
