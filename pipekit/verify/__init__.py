"""`pipekit verify`: the user's own model under every layout that fits, held to one process that uses torch alone."""
