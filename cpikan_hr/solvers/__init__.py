"""How weights are found: local solves on tiles (closed form, Gauss-Newton), and first-order optimisers."""
