"""Result tables from JSON."""
