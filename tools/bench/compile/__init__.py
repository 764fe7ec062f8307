"""What compiling costs: seconds and memory, of its stages, of the whole command, of scores."""
