"""Packed layouts of compressed weights as pure functions, each with a picture of its bytes."""
