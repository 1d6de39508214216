"""Plug-ins and tools of the study."""
