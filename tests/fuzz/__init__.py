"""Bad inputs by the thousand, and what comes of each: python -m tests.fuzz --minutes=10."""
