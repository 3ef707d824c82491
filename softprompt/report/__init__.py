"""What runs gave, read from their folders: as a table, and as a page of figures."""
