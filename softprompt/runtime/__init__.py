"""What any long computation needs: progress, memory, signals and the compilation cache."""
