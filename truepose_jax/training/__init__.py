"""The training step and what stands around it: start, optimizer, validation, log, accounts, checkpoints."""
