"""Loading a checkpoint to use it: logits, likelihoods, generation, chat."""
