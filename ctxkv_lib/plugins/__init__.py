"""Name, identify, check and build plug-ins: a user's own classes and functions."""
