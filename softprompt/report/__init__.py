"""Reports about runs, read from their folders: tables, and a page of figures."""
