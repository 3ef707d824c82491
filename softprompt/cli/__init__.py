"""The command line. Only this package draws progress bars and prints."""
