"""The benchmark suite: parity first, then time and memory beside the best alternative."""
