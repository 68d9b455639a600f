"""Reference recipes that train small real students, for the demonstration and the tests."""
