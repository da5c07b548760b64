"""What the worker and the API share: definitions alone, no handler and no connection."""
