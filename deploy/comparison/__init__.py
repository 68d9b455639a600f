"""Two models compared: what is known of each, verdicts by metric, and the plan's difference in module names."""
