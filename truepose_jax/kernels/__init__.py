"""Attention for each kind of device, behind one door (attention/api.py)."""
