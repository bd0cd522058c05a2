"""What every room needs and no room owns: errors, command lines, torch.compile's private side, timing."""
