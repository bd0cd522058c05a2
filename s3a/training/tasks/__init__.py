"""What models are trained to do: the interface that the trainer drives, and one file for each task."""
