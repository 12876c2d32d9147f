"""The paper's tables: ablations on synthetic people, and the rows for who has the data."""
