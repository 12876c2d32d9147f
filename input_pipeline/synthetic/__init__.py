"""Synthetic people: poses, bodies, clothes and the painter, with exact labels."""
