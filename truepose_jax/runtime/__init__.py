"""What every program stands on: devices, processes, random streams, the command line, files."""
