"""Training: the step, the loop around it, and the session that resumes, evaluates and saves."""
