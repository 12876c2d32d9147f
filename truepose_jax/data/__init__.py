"""From a configuration to image sets with their region tokens."""
