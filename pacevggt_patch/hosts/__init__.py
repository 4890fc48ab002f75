"""What is known of each family of models, and nothing of the method."""
