"""One photo's labels: joints, parsing map, skeleton picture, regions; and reading them from files."""
