"""Applications that show the product at work."""
