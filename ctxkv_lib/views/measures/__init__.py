"""Figures of what a trained run is worth, made like those in `figures`: numbers in, a `Figure` out."""
