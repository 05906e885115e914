"""Command lines that measure or compute: speed, races, profiles, memory, price, placement."""
