"""How weights are found: the closed-form start and first-order optimisers."""
