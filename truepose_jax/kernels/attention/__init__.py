"""Attention: api.py is the door, reference.py the equations, the rest one file per form."""
