"""Change one model instance, and give it back."""
