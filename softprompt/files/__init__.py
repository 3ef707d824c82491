"""Files: read with limits, because they may be damaged or hostile, and written atomically."""
