"""The commands, one module each: it parses, calls one function, and prints what that returns.

Nothing heavy is imported before a command runs.
"""
