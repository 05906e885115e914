"""What a run costs, measured and computed: speed, races, profiles, memory, price."""
