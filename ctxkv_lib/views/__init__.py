"""Figures, widgets, and what notebooks show."""
