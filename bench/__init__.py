"""Timed bars: `python -m bench` measures them side by side in one process and writes them down as JSON."""
