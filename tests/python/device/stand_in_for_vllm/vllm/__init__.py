"""A stand-in for vLLM: the names, signatures and order of calls of its sleep mode, and nothing else."""
