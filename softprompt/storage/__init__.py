"""Files that a run leaves: arrays with checksums, atomic writes, locks and run folders."""
