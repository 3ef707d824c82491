"""Services of any long computation: progress, memory, signals, the compilation cache."""
