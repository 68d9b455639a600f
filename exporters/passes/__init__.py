"""Graph-surgery passes: one subject a file, each a frozen dataclass with `__call__(model) -> Outcome`.

A pass edits in place, keeps names, opset imports and metadata, and says what it left alone and why. The order in which
they run is in `exporters/surgery.py`.
"""
