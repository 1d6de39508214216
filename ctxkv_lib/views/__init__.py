"""What people see: figures, pictures, widgets, and what the notebooks show."""
