"""What is measured of a finished run when asked for."""
