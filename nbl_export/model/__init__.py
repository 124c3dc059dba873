"""A torch decoder: architecture, blocks, linearized layers, mixes."""
