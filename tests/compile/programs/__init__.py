"""Programs as people who train models write them, by theme; `lockstep.py` runs them."""
