"""Whether claims hold: by the arithmetic of a graph, by a bundle's verification, by measured timings."""
