"""What is measured of a trained run: test split, yardsticks, what its contexts remember."""
