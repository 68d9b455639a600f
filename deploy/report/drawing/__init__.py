"""Drawings as SVG inside the page: no script draws them, so they print, and are there when scripts are not.

A drawing is two pictures side by side: labels of a fixed width, and an area that takes what is left. Horizontal places
in the area are percent of its width, so that text, marks and lines keep their size on every screen. Colours are classes
of the style sheet, for light, dark and print.
"""
