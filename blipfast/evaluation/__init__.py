"""How well a model retrieves and captions."""
