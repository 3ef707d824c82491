"""Many trials of one experiment: which, how they train side by side, and what they give."""
