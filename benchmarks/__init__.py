"""What a norm and a clip cost, as ratios to Optax measured in the same run."""
