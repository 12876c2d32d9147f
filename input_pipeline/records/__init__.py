"""Built datasets: written once, read at random, annotated and checked."""
