"""The shipped equations, one per file, and what an equation says of itself (`base.py`)."""
