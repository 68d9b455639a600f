"""Time engines so that a sceptic believes the figures: calls, conditions, statistics, the history of the results."""
