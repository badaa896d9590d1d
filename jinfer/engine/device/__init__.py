"""What runs on the device: packing of plans, the runner, page moves, the drafter."""
