"""Finds a person in a photo: joints, mask and parsing map; by files that come along, or by models of transformers."""
