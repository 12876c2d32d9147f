"""Pictures from a trained model: the Pipeline, and the requests that programs make of files and records."""
