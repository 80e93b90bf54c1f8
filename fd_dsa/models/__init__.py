"""Models of the DSA family: configuration, checkpoints and Paddle layers."""
