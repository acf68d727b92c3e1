"""The workloads' networks and losses in jax, over flat dicts with the torch models' names and layouts."""
