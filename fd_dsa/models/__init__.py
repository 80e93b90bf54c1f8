"""Model families: registry, configurations, checkpoints, weights and layers."""
