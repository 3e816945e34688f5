"""Live cameras: several sources in one call, labels as they change, and a bounded delay."""
