"""Files that runs write: arrays with checksums, atomic writes, locks and run folders."""
