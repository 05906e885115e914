"""What the machine is and can do: chips, devices, processes, and what a model needs of them."""
