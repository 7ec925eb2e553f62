"""What touches the machine: atomic files, locks, signals, the hub, named seeds."""
