"""The command line: one module per command. Only this package draws progress bars and prints."""
