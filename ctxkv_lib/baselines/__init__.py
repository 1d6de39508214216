"""What stands beside contexts with as many trained weights, through the same Phase 2: `model.memory`."""
