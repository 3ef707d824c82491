"""Training: the step, the loop around it, and the session that decides what is due when."""
