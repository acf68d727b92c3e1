"""Train one model with several losses, where each loss may update only some of the parameters."""
