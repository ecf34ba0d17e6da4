"""One script for each framework: attach the record, train, read it."""
