"""The model in PyTorch, for readers of an export. Needs the extra [torch]."""
