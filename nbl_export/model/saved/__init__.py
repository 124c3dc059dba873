"""NBL models in the forms of other engines, made of torch models and checkpoints."""
